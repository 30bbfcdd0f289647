"""A MkDocs hook: links to repository files that are not part of the site become plain names."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)]*)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    def named(link: re.Match[str]) -> str:
        label, path = link.groups()
        return f"`{path}`" if path.startswith(label) else f"{label} (`{path}`)"

    return _OUTSIDE.sub(named, markdown) if "/" not in page.file.src_uri else markdown
