"""The code of each page in docs/ runs, in order, as printed, and links lead somewhere."""

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


BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```(?:\n+```text\n(?P<output>.*?)^```)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
SEPARATOR = "-- end of a block --"


def blocks(page):
    """The code of each block, and the output that the page prints below it, or None."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [match.group("code", "output") for match in BLOCK.finditer(text)]


def compare(printed, output):
    """The same words, and numbers within half: trained on another processor, they differ."""
    assert NUMBER.sub("#", output.strip()) == NUMBER.sub("#", printed.strip())
    found, stated = (list(map(float, NUMBER.findall(text))) for text in (output, printed))
    assert found == pytest.approx(stated, rel=0.5)


# What compiling meets inside torch.
TORCHS_OWN = "ignore:`torch.jit.script"


@pytest.mark.parametrize("page", PAGES or ["docs"])
def test_the_python_blocks_run(page, tmp_path):
    if not PAGES:
        pytest.skip("the sources are not here")
    parts = blocks(page)
    assert parts
    code = [f'{code}\nprint("{SEPARATOR}")\n' for code, _ in parts]
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
    for output, (_, stated) in zip(done.stdout.split(SEPARATOR), parts, strict=False):
        if stated is not None:
            compare(stated, output)


def test_the_index_names_every_page():
    if not PAGES:
        pytest.skip("the sources are not here")
    linked = re.findall(
        r"^- \[.*?\]\((.*?\.md)\)", (DOCS / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(linked) == PAGES
