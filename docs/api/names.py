"""A griffe extension for mkdocstrings: expands three abbreviations of the docstrings.

An entry `a, b: text` in a section becomes one entry per name; a public name in backticks, and the
file of a guide, become links.
"""

import re
from pathlib import Path
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Raises):$")
_SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*)$")
_GUIDE = re.compile(r"\bdocs/([\w-]+\.md)\b")
_CODE = re.compile(r"(?<!\[)`(\w+(?:\.\w+)*)`")


def one_name_per_entry(docstring: str) -> str:
    lines: list[str] = []
    entry: list[list[str]] = []  # one copy of the entry for each name
    inside = False

    def flush() -> None:
        for copy in entry:
            lines.extend(copy)
        entry.clear()

    for line in docstring.splitlines():
        several = _SEVERAL.match(line) if inside else None
        if several:
            flush()
            entry.extend([f"    {name}: {several[2]}"] for name in several[1].split(", "))
        elif entry and line.startswith("     "):
            for copy in entry:
                copy.append(line)
        else:
            flush()
            lines.append(line)
        if line and not line.startswith(" "):
            inside = bool(_SECTION.match(line))
    flush()
    return "\n".join(lines)


def documented() -> dict[str, str]:
    """{name: path} of every `::: path` on the pages; a name is a full path or its last part."""
    found: dict[str, str] = {}
    for page in sorted(Path(__file__).parent.glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
            found[path] = found[path.rpartition(".")[2]] = path
    return found


def _title(guide: str) -> str:
    page = Path(__file__).parents[1] / guide
    return page.read_text("utf-8").partition("\n")[0].removeprefix("# ")


class Names(griffe.Extension):
    def __init__(self) -> None:
        self.documented = documented()

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._rewrite(pkg)

    def _rewrite(self, thing: griffe.Object) -> None:
        if thing.docstring is not None:
            near = {thing.name, *thing.members}
            if thing.parent is not None and thing.parent.is_class:
                near |= {thing.parent.name, *thing.parent.members}
            text = one_name_per_entry(thing.docstring.value)
            text = _GUIDE.sub(lambda guide: f"[{_title(guide[1])}](../{guide[1]})", text)
            thing.docstring.value = _CODE.sub(lambda code: self._link(code, near), text)
        for member in thing.members.values():
            if not member.is_alias:
                self._rewrite(member)

    def _link(self, code: re.Match[str], near: set[str]) -> str:
        """The code as a link, unless it names the object itself, its class or a member of it."""
        owner, _, member = code[1].rpartition(".")
        path = self.documented.get(code[1])
        if path is None and owner in self.documented:
            path = f"{self.documented[owner]}.{member}"
        return code[0] if path is None or code[1] in near else f"[`{code[1]}`][{path}]"
