"""docs/migration.md: the meta-gradients of other libraries and ours are the same."""

import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="needs the source tree")
MODULES = {
    "the authors' code": "implicit_maml",
    "TorchOpt": "torchopt",
    "higher": "higher",
    "learn2learn": "learn2learn",
    "jaxopt": "jaxopt",
}


def sections():
    """The code that all sections start with, and {library: its two blocks}."""
    start, *parts = re.split(r"^## From (.*)\n", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    names, texts = parts[::2], parts[1::2]
    return blocks(start), {name: blocks(text) for name, text in zip(names, texts, strict=True)}


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_library_has_a_section_of_two_blocks():
    (_,), by_library = sections()
    assert {name: len(code) for name, code in by_library.items()} == dict.fromkeys(MODULES, 2)


@pytest.mark.parametrize("library", MODULES)
def test_a_meta_gradient_of_another_library_is_the_same_here(library):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the other library
        pytest.importorskip(MODULES[library])
        (setting,), by_library = sections()
        theirs, ours = by_library[library]
        names = {"__name__": "__main__"}
        exec(compile(setting + theirs, f"{library}, theirs", "exec"), names)
    exec(compile(setting + ours, f"{library}, ours", "exec"), names)
    torch.testing.assert_close(
        list(names["ours"]), list(names["theirs"]), rtol=1e-6, atol=1e-9, check_dtype=False
    )
