"""README, docs/ and the API reference: the code runs, links resolve, docstrings are complete."""

import ast
import dataclasses
import enum
import inspect
import json
import pydoc
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import get_origin

import pytest

import imaml_ext
import imaml_ext.data
import imaml_ext.solvers.inner
from imaml_ext.cli import _parser
from imaml_ext.experiments.build import build
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.run import train_to_end

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")

# ---- code --------------------------------------------------------------------------------------

GUIDES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")
SLOW = {
    "tutorial.md",
    "distributed.md",
    "recording.md",
    "inner-solver.md",
    "hyperparameters.md",
    "learned-features.md",
    "tables.md",
}
WITH_OWN_TESTS = {"examples.md", "migration.md", "command-line.md"}  # the last has no Python code
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```(?:\n+```text\n(?P<output>.*?)^```)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def run_blocks(page, capsys):
    """Run the Python blocks of a page in order. Returns its names and what each block printed.

    Where the page states a block's output, the words must be the same, and the numbers within 50%:
    they depend on the processor.
    """
    blocks = [match.group("code", "output") for match in BLOCK.finditer(page.read_text("utf-8"))]
    assert blocks
    names, outputs = {"__name__": "__main__"}, []
    for code, stated in blocks:
        exec(compile(code, page.name, "exec"), names)
        printed = capsys.readouterr().out
        outputs.append(printed)
        if stated is not None:
            assert NUMBER.sub("#", printed.strip()) == NUMBER.sub("#", stated.strip())
            got, expected = (list(map(float, NUMBER.findall(text))) for text in (printed, stated))
            assert got == pytest.approx(expected, rel=0.5)
    return names, outputs


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p
        for p in GUIDES
        if p not in WITH_OWN_TESTS
    ],
)
def test_the_code_of_a_guide_runs_and_prints_the_stated_output(
    page, tmp_path, monkeypatch, capsys, request
):
    monkeypatch.chdir(tmp_path)
    if page == "tables.md":
        request.getfixturevalue("small_omniglot")
    names, outputs = run_blocks(DOCS / page, capsys)
    assert "nan" not in "".join(outputs)
    if page == "hyperparameters.md":
        assert names["learned_test"] < 0.8 * names["grid_test"]


def test_the_code_of_the_readme_runs(capsys):
    names, (printed,) = run_blocks(ROOT / "README.md", capsys)
    gradient, description, errors = printed.split("\n", 2)
    assert re.fullmatch(r"tensor\(\[.*, .*, .*\]\)", gradient)
    assert "of 16 tasks" in description
    assert names["out"].linear.error_estimate.max() < 1e-4  # five steps solve for three unknowns
    assert errors.startswith("tensor([")


COMMANDS = [
    command
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    for command in re.findall(
        r"^ {4}.*?\bimaml[-_]ext ((?:train|eval|reproduce)\b.*)$",
        page.read_text("utf-8").replace("\\\n", " "),
        re.MULTILINE,
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_accepts_the_commands_of_the_pages(command):
    arguments = shlex.split(command, comments=True)
    assert _parser().parse_args(arguments).run
    models = [name for name in arguments if name.startswith("results/")]
    assert all((ROOT / name).is_file() for name in models)


def test_the_readme_has_at_most_700_words():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text("utf-8"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert sum(any(c.isalnum() for c in word) for word in text.split()) <= 700


# ---- the table of metrics.jsonl ----------------------------------------------------------------


def entries_of_lines():
    """{entry: the lines that have it}, from the table of records."""
    section = (DOCS / "api" / "training.md").read_text("utf-8").partition("## Records")[2]
    return dict(re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", section, re.MULTILINE))


@pytest.mark.parametrize("dataset", ["sinusoid", "omniglot"])
@pytest.mark.parametrize("method", ["imaml", "fomaml"])
def test_metrics_jsonl_has_the_entries_in_the_table_of_records(
    dataset, method, small_omniglot, tmp_path
):
    config = dataclasses.replace(
        PRESETS[dataset], method=method, meta_steps=2, tasks=2, query=1, inner_steps=1, cg_steps=1
    )
    experiment = build(config)
    trainer = experiment.trainer()
    train_to_end(experiment, trainer, tmp_path / "checkpoint.pt", validations=1, validation_tasks=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train", "train", "val"]
    for line in lines:
        included = {"all", line["split"], method, "images" if dataset == "omniglot" else ""}
        table = entries_of_lines().items()
        assert set(line) == {name for name, which in table if set(which.split(", ")) <= included}


# ---- links and versions ------------------------------------------------------------------------

PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "results/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def prose(page):
    """The text without code; brackets in inline code are not links."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", "("), text)


def anchors(page):
    """Anchors of the headings, as GitHub and MkDocs derive them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


FOLDERS = (
    ".ci", "benchmarks", "build_backend", "csrc", "docs", "examples", "imaml_ext", "python_tests",
)  # fmt: skip
SOURCES = [*ROOT.glob("*.py"), *(path for f in FOLDERS for path in (ROOT / f).rglob("*.*"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_that_a_page_names_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names files of earlier versions")
    names = re.findall(r"(?<![*\w])[\w./-]+\.(?:py|cpp|cuh?)\b", page.read_text("utf-8"))
    paths = [str(path) for path in SOURCES]
    names = [name.removeprefix("../") for name in names]  # the target of a link
    missing = {name for name in names if not any(path.endswith(f"/{name}") for path in paths)}
    assert {name for name in missing if "NAME" not in name} == set()


def test_the_index_lists_every_guide():
    linked = re.findall(
        r"^- \[.*?\]\((.*?\.md)\)", (DOCS / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(linked) == GUIDES


def test_the_citation_states_the_package_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    (version,) = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    assert version == imaml_ext.__version__


# ---- the API reference and its docstrings ------------------------------------------------------


def test_no_returns_section_looks_like_a_type_and_a_description():
    """One with ": " is rendered as "type: description"."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for path in (ROOT / "imaml_ext").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, kinds)):
            docstring = ast.get_docstring(node) or ""
            section = docstring.partition("Returns:\n")[2].partition("\n\n")[0]
            assert ": " not in section.replace("\n", " "), (path, node.name)


NAMES = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
]
BY_LAST_NAME = {name.rpartition(".")[2]: name for name in NAMES}


def entries(thing):
    """The entries under Args and Attributes in a docstring, {name: text}."""
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
    """Whether the docstring describes a parameter, or refers to a name that documents it."""
    own = entries(thing) | (entries(thing.__call__) if inspect.isclass(thing) else {})
    if parameter not in own:
        return False
    other = re.match(r"(?:.*, )?as in `([\w.]+)`", own[parameter])
    if other is None:
        return len(own[parameter]) > 2
    target = BY_LAST_NAME.get(other[1], other[1])
    described = pydoc.locate(target)
    if described is None or described is thing:
        return False
    if target.startswith("imaml_ext."):
        return parameter == "settings" or documents(described, parameter)
    return parameter in inspect.signature(described).parameters


def parameters(thing):
    if inspect.isclass(thing):
        if issubclass(thing, enum.Enum):
            return list(thing.__members__)
        if not getattr(thing.__init__, "__module__", "").startswith("imaml_ext"):
            return []  # a protocol's, an exception's
    return [name for name in inspect.signature(thing).parameters if name != "self"]


def test_every_public_name_is_in_the_reference_once():
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    documented = [pydoc.locate(name) for name in NAMES]
    for package in (imaml_ext, imaml_ext.data, imaml_ext.solvers.inner):
        for name in package.__all__:
            thing = getattr(package, name)
            assert sum(one is thing for one in documented) == 1, name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_reference_exists_and_documents_every_parameter(name):
    thing = pydoc.locate(name)
    assert thing is not None, "no such name"
    if isinstance(thing, str) or get_origin(thing):
        return  # the version, a type alias: the page describes it
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}(")  # generated by dataclass
    assert [p for p in parameters(thing) if not documents(thing, p)] == []
    accepted = {*parameters(thing), *dir(thing), *getattr(thing, "__annotations__", {})}
    if inspect.isfunction(thing):
        assert entries(thing).keys() <= accepted, "documented, but not a parameter"


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(pydoc.locate(name))])
def test_every_public_method_has_a_docstring(name):
    thing = pydoc.locate(name)
    for member, value in inspect.getmembers(thing):
        module = getattr(getattr(value, "fget", value), "__module__", None) or ""
        if not member.startswith("_") and module.startswith("imaml_ext"):
            assert inspect.getdoc(value) or member in entries(thing), member
