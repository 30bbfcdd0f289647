"""Modules that importing the package loads. import-linter checks the imports between packages."""

import subprocess
import sys


def test_importing_the_package_loads_only_torch_and_its_own_modules(tmp_path):
    # No progress bar, no plotting, and none of the heavy parts of torch that are loaded on first
    # use, such as its compiler.
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
