"""The code of each page in docs/ runs, in order, as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")
RESULTS = {
    "hyperparameters.md": "assert learned_test < 0.8 * grid_test, (learned_test, grid_test)",
}


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# What compiling meets inside torch.
TORCHS_OWN = "ignore:`torch.jit.script"


@pytest.mark.parametrize("page", PAGES or ["docs"])
def test_the_python_blocks_run(page, tmp_path):
    if not PAGES:
        pytest.skip("the sources are not here")
    code = blocks(page)
    assert code
    # An interpreter of its own: no names, seeds or imports of another page.
    script = tmp_path / f"{Path(page).stem}.py"
    start = "import torch\n\ntorch.set_num_threads(1)\n"
    script.write_text("\n".join([start, *code, RESULTS.get(page, "")]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", TORCHS_OWN, str(script)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout


def test_the_index_names_every_page():
    if not PAGES:
        pytest.skip("the sources are not here")
    linked = re.findall(
        r"^- \[.*?\]\((.*?\.md)\)", (DOCS / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(linked) == PAGES
