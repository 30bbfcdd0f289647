"""A MkDocs hook for links.

A guide's file name, as the text of a link, becomes its title in the navigation. Of the repository's
files that are not in docs/, pictures and examples are added to the site; links to others become
plain names.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

_PICTURES = ("results/fig2a.png",)
_NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"  # the page of examples is
_GUIDE = re.compile(r"\[[\w/-]+\.md\](\((?:\.\./)*([\w-]+\.md)(?:#[\w-]+)?\))")
_PICTURE = re.compile(r"!\[([^\]]*)\]\(\.\./([^)]*)\)")
_EXAMPLE = re.compile(r"\(\.\./(examples/\w+)\.py\)")
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)]*)\)")


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    root = Path(config.docs_dir).parent
    for picture in _PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(root / picture)))
    for path in sorted((root / "examples").glob("*.py")):
        page = f"{_NOT_SEARCHED}# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        name, hidden = f"examples/{path.stem}.md", InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=page, inclusion=hidden))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("examples/"):
        return markdown
    titles = _titles(config.nav)
    markdown = _GUIDE.sub(
        lambda link: f"[{titles[link[2]]}]{link[1]}" if link[2] in titles else link[0], markdown
    )
    if "/" in page.file.src_uri:
        return markdown

    def named(link: re.Match[str]) -> str:
        label, path = link.groups()
        return f"`{path}`" if path.startswith(label) else f"{label} (`{path}`)"

    markdown = _EXAMPLE.sub(r"(\1.md)", _PICTURE.sub(r"![\1](\2)", markdown))
    return _OUTSIDE.sub(named, markdown)


def _titles(nav: Any) -> dict[str, str]:
    """{file: title} of the guides, without the sections."""
    titles: dict[str, str] = {}
    for entry in nav:
        if isinstance(entry, dict):
            for title, what in entry.items():
                titles |= _titles(what) if isinstance(what, list) else {what: title}
    return titles
