"""Links between the pages lead somewhere, and what is stated twice is the same."""

import re
from pathlib import Path

import pytest

import imaml_ext

SOURCES = Path(__file__).parents[1]
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "results/*.md", "benchmarks/*.md")
    for path in sorted(SOURCES.glob(pattern))
]
pytestmark = pytest.mark.skipif(not PAGES, reason="the sources are not here")


def prose(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", "("), text)


def anchors(page):
    """What the headings of a page are linked to by, as GitHub and MkDocs make it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SOURCES)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_citation_is_of_this_version():
    citation = (SOURCES / "CITATION.cff").read_text("utf-8")
    (version,) = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    assert version == imaml_ext.__version__
