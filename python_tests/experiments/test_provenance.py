"""The provenance of measurements."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imaml_ext.experiments import provenance
from imaml_ext.experiments.provenance import describe_run


def test_a_run_is_described_by_command_versions_and_device(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/folder/imaml-ext", "reproduce", "fig2a"])
    described = describe_run(torch.device("cpu"))
    assert described["command"] == "imaml-ext reproduce fig2a"
    assert (described["torch"], described["python"]) == (
        torch.__version__,
        platform.python_version(),
    )
    assert json.loads(json.dumps(described)) == described


def git(*arguments, folder):
    run = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.fixture
def module_in_a_repository(tmp_path, monkeypatch):
    git("init", "--quiet", folder=tmp_path)
    module = tmp_path / "module.py"
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    return module


def commit(folder):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    git("add", "module.py", folder=folder)
    git(*identity, "commit", "--quiet", "--message", "x", folder=folder)
    return git("rev-parse", "--short=12", "HEAD", folder=folder)


def test_the_commit_is_that_of_the_sources_and_marked_if_they_changed(module_in_a_repository):
    head = commit(module_in_a_repository.parent)
    assert describe_run(torch.device("cpu"))["commit"] == head
    module_in_a_repository.write_text("changed")
    assert describe_run(torch.device("cpu"))["commit"] == f"{head}-dirty"


def test_a_copy_that_is_not_in_the_repository_around_it_has_no_commit(module_in_a_repository):
    commit(module_in_a_repository.parent)
    provenance.__file__ = str(Path(module_in_a_repository).with_name("installed.py"))
    assert describe_run(torch.device("cpu"))["commit"] == ""
