"""Imports go down the floor plan, and nothing heavy is loaded before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import imaml_ext

# From the ground up; a room imports from rooms below it only.
FLOORS = [
    {"_version", "blame", "files", "precision", "random", "snapshot", "solution"},
    {"looking"},
    {"ops", "flat", "checkpoint", "compiling", "data.cache", "logs"},
    {"layers", "models", "presets"},
    {"objective", "linear", "strength"},
    {"cg", "minres", "neumann", "proximal", "shared"},
    {"inner.base", "inner.line_search", "meta_gradient", "tasks"},
    {
        "inner.adam",
        "inner.external",
        "inner.gradient_descent",
        "inner.hessian_free",
        "inner.lbfgs",
    },
    {"inner", "recording", "distributed"},
    {"implicit"},
    {"methods", "provenance", "reference_code"},
    {"maml", "evaluation"},
    {
        "data.omniglot",
        "data.mini_imagenet",
        "data.tiny_imagenet",
        "data.regression",
        "data.episodes",
    },
    {"data"},
    {"device_step"},
    {"trainer"},
    {"experiment"},
    {"training"},
    {"plots"},
    {"reproduce.study", "reproduce.memory"},
    {
        "reproduce.fig2a",
        "reproduce.fig2b",
        "reproduce.sinusoid",
        "reproduce.table1",
        "reproduce.table_report",
    },
    {"reproduce.tables"},
    {"reproduce"},
    {"cli"},
    {"__main__"},
]
APART = {"reference", "_C", "__init__"}


def module_name(path):
    parts = path.relative_to(imaml_ext.__path__[0]).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not follow"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imaml_ext"):
            below = node.module.removeprefix("imaml_ext").removeprefix(".")
            for alias in node.names:
                yield below or alias.name
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("imaml_ext") for alias in node.names)


def test_imports_point_down():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    files = {module_name(p): p for p in Path(imaml_ext.__path__[0]).rglob("*.py")}
    assert files.keys() - APART == floor.keys()
    for name, path in files.items():
        if name in APART:
            continue
        for other in imported(path):
            if other in APART:
                assert (name, other) == ("ops", "_C"), f"{name} imports {other}"
            else:
                assert floor[other] < floor[name], f"{name} imports {other}, which is not below it"


def test_the_reference_stands_alone():
    path = Path(imaml_ext.__path__[0]) / "reference.py"
    assert not list(imported(path))


def test_importing_the_package_adds_to_torch_only_its_own_modules(tmp_path):
    # No progress bar, no plots, and nothing heavy that torch itself loads when it is used, such as
    # its compiler.
    code = (
        "import sys, torch; before = set(sys.modules); import imaml_ext; "
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    added = set(result.stdout.split())
    assert {name for name in added if name.split(".")[0] != "imaml_ext"} == set()
    for later in ("cli", "experiment", "plots", "presets", "reference", "reproduce", "data"):
        assert f"imaml_ext.{later}" not in added
    assert "imaml_ext.implicit" in added
