"""README.md as the description on a package index, which does not serve the files it links to."""

import re
from pathlib import Path

CODE = r"(?P<code>```.*?```|`[^`\n]+`|^ {4}.*?$)"
RELATIVE = r"\((?P<path>(?![a-z][a-z0-9+.-]*:|#)[^)\s]+)\)"
LINK = re.compile(rf"{CODE}|(?P<image>!?)\[(?P<text>[^\]]+)\]{RELATIVE}", re.DOTALL | re.MULTILINE)
# What says nothing without its links: a figure and its caption, a section that is a list of links,
# a link in parentheses.
EMPTY = re.compile(
    r"!\[[^\]]*\]\(\S+\)\n\n\*[^*]+\*\n\n"
    r"|^##[^\n]*\n\n(?:\[[^\]]+\]\(\S+\)(?: ·)?\s+)+(?=#|\Z)"
    r"|\s\(\[[^\]]+\]\((?!https?:)\S+\)\)",
    re.MULTILINE,
)


def for_index(readme: str, repository: str, revision: str) -> str:
    """Link to a revision of the repository. Without one, keep only the texts of the links."""

    def replace(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        if not repository:
            return found["text"]
        kind = "raw" if found["image"] else "blob"
        address = f"{repository.rstrip('/')}/{kind}/{revision}/{found['path']}"
        return f"{found['image']}[{found['text']}]({address})"

    return LINK.sub(replace, readme if repository else EMPTY.sub("", readme))


def description(source: Path) -> str:
    """README.md with links to the tag of the version, at the Source of pyproject.toml's URLs."""

    def find(pattern: str, name: str) -> str:
        found = re.search(pattern, (source / name).read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else ""

    version = find(r'^__version__ = "(.+)"$', "imaml_ext/_version.py")
    repository = find(r'^Source = "(.+)"$', "pyproject.toml")
    readme = (source / "README.md").read_text(encoding="utf-8")
    return for_index(readme, repository, f"v{version}")
