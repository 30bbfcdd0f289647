"""The gallery, docs/examples.md, has every program of examples/."""

import ast

import pytest

from examples import EXAMPLES

ROOT = EXAMPLES.parent
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_there_are_examples():
    assert len(NAMES) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_section_a_picture_and_a_test(name):
    gallery = (ROOT / "docs" / "examples.md").read_text("utf-8")
    assert f"`examples/{name}.py`" in gallery
    assert f"(images/{name}.png)" in gallery
    picture = ROOT / "docs" / "images" / f"{name}.png"
    assert 5_000 < picture.stat().st_size < 100_000
    assert (ROOT / "python_tests" / "examples" / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_on_150_lines_and_states_its_command_and_date(name):
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert len(source.splitlines()) <= 150
    docstring = ast.get_docstring(ast.parse(source))
    for stated in (f"examples/{name}.py", "torch 2.", "20", "seed"):
        assert stated in docstring
