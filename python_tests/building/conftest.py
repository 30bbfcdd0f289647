"""Imports of scripts outside the package, with the import path that the scripts use."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch):
    """Import a module of .ci/gpu_check."""
    if not (ROOT / ".ci" / "gpu").is_file():
        pytest.skip("needs the source tree")
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    monkeypatch.syspath_prepend(str(ROOT / ".ci" / "gpu_check"))
    return lambda name: importlib.import_module(f"gpu_check.{name}")


@pytest.fixture
def benchmark(monkeypatch):
    """Import a module of benchmarks/."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("needs the source tree")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module
