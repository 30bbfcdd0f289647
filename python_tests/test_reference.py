"""The API reference in docs/api/, and the docstrings that it is generated from."""

import enum
import inspect
import pydoc
import re
from collections import Counter
from pathlib import Path
from typing import get_origin

import pytest

import imaml_ext
import imaml_ext.data
import imaml_ext.solvers.inner

API = Path(__file__).parents[1] / "docs" / "api"
NAMES = [
    name
    for page in sorted(API.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
]
BY_LAST_NAME = {name.rpartition(".")[2]: name for name in NAMES}
pytestmark = pytest.mark.skipif(not API.is_dir(), reason="no source tree")


def entries(thing):
    """The entries of a docstring's Args and Attributes, {name: text}."""
    found, inside, names = {}, False, []
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
        elif inside and (entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line)):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif inside and line:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def documents(thing, parameter):
    """Whether the docstring describes a parameter, or refers to one that does."""
    own = entries(thing) | (entries(thing.__call__) if inspect.isclass(thing) else {})
    if parameter not in own:
        return False
    other = re.match(r"(?:.*, )?as in `([\w.]+)`", own[parameter])
    if other is None:
        return len(own[parameter]) > 2
    known = BY_LAST_NAME.get(other[1], other[1])
    described = pydoc.locate(known)
    if described is None or described is thing:
        return False
    if known.startswith("imaml_ext."):
        return parameter == "settings" or documents(described, parameter)
    return parameter in inspect.signature(described).parameters


def parameters(thing):
    if inspect.isclass(thing):
        if issubclass(thing, enum.Enum):
            return list(thing.__members__)
        if not getattr(thing.__init__, "__module__", "").startswith("imaml_ext"):
            return []  # of a protocol or exception
    return [name for name in inspect.signature(thing).parameters if name != "self"]


def test_every_public_name_is_in_the_reference_once():
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    documented = [pydoc.locate(name) for name in NAMES]
    for package in (imaml_ext, imaml_ext.data, imaml_ext.solvers.inner):
        for name in package.__all__:
            thing = getattr(package, name)
            assert sum(one is thing for one in documented) == 1, name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_reference_has_a_docstring_that_describes_every_parameter(name):
    thing = pydoc.locate(name)
    assert thing is not None, "no such name"
    if isinstance(thing, str) or get_origin(thing):
        return  # a version or type, described on the page
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}(")  # a dataclass's default
    assert [p for p in parameters(thing) if not documents(thing, p)] == []
    accepted = {*parameters(thing), *dir(thing), *getattr(thing, "__annotations__", {})}
    if inspect.isfunction(thing):
        assert entries(thing).keys() <= accepted, "describes an unknown parameter"


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(pydoc.locate(name))])
def test_every_public_method_has_a_docstring(name):
    thing = pydoc.locate(name)
    for member, value in inspect.getmembers(thing):
        place = getattr(getattr(value, "fget", value), "__module__", None) or ""
        if not member.startswith("_") and place.startswith("imaml_ext"):
            assert inspect.getdoc(value) or member in entries(thing), member
