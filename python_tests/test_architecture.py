"""What an import of the package loads. Which room may import which is import-linter's to check."""

import subprocess
import sys


def test_importing_the_package_adds_to_torch_only_its_own_modules(tmp_path):
    # No progress bar, no plots, and nothing heavy that torch itself loads when it is used, such as
    # its compiler.
    code = (
        "import sys, torch; before = set(sys.modules); import imaml_ext; "
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    added = set(result.stdout.split())
    assert {name for name in added if name.split(".")[0] != "imaml_ext"} == set()
    for later in ("cli", "experiments", "reference"):
        assert f"imaml_ext.{later}" not in added
    assert "imaml_ext.methods.implicit" in added
