"""A MkDocs hook for links to repository files that are not in docs/.

Pictures are added to the site; other links become plain names.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_PICTURES = ("results/fig2a.png",)
_PICTURE = re.compile(r"!\[([^\]]*)\]\(\.\./([^)]*)\)")
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)]*)\)")


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    root = Path(config.docs_dir).parent
    for picture in _PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(root / picture)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if "/" in page.file.src_uri:
        return markdown

    def named(link: re.Match[str]) -> str:
        label, path = link.groups()
        return f"`{path}`" if path.startswith(label) else f"{label} (`{path}`)"

    return _OUTSIDE.sub(named, _PICTURE.sub(r"![\1](\2)", markdown))
