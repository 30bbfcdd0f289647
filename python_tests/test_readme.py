"""The README's code runs, in order, as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_python_blocks_run(capsys):
    if not README.is_file():
        pytest.skip("the sources are not here")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    loss, description, bound = capsys.readouterr().out.split("\n", 2)
    assert float(re.search(r"tensor\(([\d.]+)", loss)[1]) < 10
    assert "of 16 tasks" in description
    assert bound.startswith("tensor([")
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
