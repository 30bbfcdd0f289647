"""Trainings that are killed, and folders that cannot be written to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imaml_ext._io import locked
from imaml_ext.cli import main
from imaml_ext.training.checkpoint import load_checkpoint

HERE = Path(__file__).parents[1] / "helpers"  # has no imaml_ext that would be imported instead
QUICK = ["--tasks", "3", "--inner-steps", "1", "--cg-steps", "2", "--eval-tasks", "2"]
QUICK += ["--device", "cpu", "--validations", "3"]
KILLS = int(os.environ.get("IMAML_TEST_KILLS", "10"))


def run(*arguments):
    """Run Python in another process, where warnings are not errors."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=60 + 20 * KILLS, cwd=HERE,
    )  # fmt: skip


def without_times(value):
    """A copy of nested dicts and lists without the entries "seconds"."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def assert_same(got, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_same(got[name], expected[name])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected


@pytest.mark.slow
def test_a_training_killed_at_any_moment_ends_like_an_uninterrupted_one(tmp_path):
    steps = ["--meta-steps", str(12 * KILLS)]
    done = run("-m", "imaml_ext", "train", *QUICK, *steps, "--out", tmp_path / "uninterrupted")
    assert done.returncode == 0, done.stderr
    killed = run(
        "killing.py", tmp_path / "killed", 0, KILLS,
        *QUICK, *steps, "--save-every", "0",
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr
    counts = json.loads(killed.stdout)
    print(f"killed {counts}")  # with pytest -s
    assert counts["in a write"] == KILLS // 5
    got, expected = (
        load_checkpoint(tmp_path / name / "checkpoint.pt", training=True)
        for name in ("killed", "uninterrupted")
    )
    assert_same(without_times(got), without_times(expected))
    got, expected = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("killed", "uninterrupted")
    )
    assert without_times(got) == without_times(expected)
    assert not list((tmp_path / "killed").glob("*unfinished*"))


# ---- Folders that cannot be written to -------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", *QUICK, "--out", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_two_trainings_in_one_folder_are_refused(tmp_path, capsys):
    with locked(tmp_path):
        assert main(["train", *QUICK, "--meta-steps", "2", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(f"another process is using {tmp_path}\n")
    assert main(["train", *QUICK, "--meta-steps", "2", "--out", str(tmp_path)]) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A function that runs imaml-ext with a disk of some kB mounted; returns status and errors."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare, which mounts a small disk, is not installed")
    folder = tmp_path / "disk"
    folder.mkdir()

    def run_on(kilobytes, *arguments, options="rw"):
        mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder}"
        refuse = f"mount -o remount,{options} {folder}"
        keep = f"mkdir -p {tmp_path}/kept && cp -a {folder}/. {tmp_path}/kept"
        command = " ".join([sys.executable, "-m", "imaml_ext", *map(str, arguments)])
        put = f"cp -a {tmp_path}/before/. {folder} 2>/dev/null"
        script = f"{mount} || exit 77; {put}; {refuse}; {command}; code=$?; {keep}; exit $code"
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONWARNINGS": "ignore"}, cwd=HERE,
        )  # fmt: skip
        if done.returncode == 77 or "unshare failed" in done.stderr:
            pytest.skip("a disk cannot be mounted here")
        progress = ("step/s", "s/step", "resuming from", "results in", "recorded programs")
        lines = [line for line in done.stderr.splitlines() if not any(u in line for u in progress)]
        return done.returncode, [line for line in lines if line.strip()]

    return run_on


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, 4, 20, 36, 40])
def test_a_full_disk_is_a_one_line_error_and_keeps_the_checkpoint(spare, tmp_path, small_disk):
    """The disk fills in the log, at the start or in the middle of a checkpoint, or after it."""
    before, out = tmp_path / "before" / "run", tmp_path / "disk" / "run"
    assert main(["train", *QUICK, "--meta-steps", "5", "--out", str(before)]) == 0
    size = sum(-(-len(content) // 4096) * 4 for content in files(before).values())
    arguments = ["train", "--resume", "--meta-steps", "900", "--save-every", "0", "--out", out]
    code, errors = small_disk(size + spare, *arguments)
    assert code == 1
    assert len(errors) == 1
    assert errors[0].startswith("imaml-ext: error: [Errno 28] No space left on device: '")
    kept = files(tmp_path / "kept" / "run")
    assert not [name for name in kept if "unfinished" in name]
    (tmp_path / "kept.pt").write_bytes(kept["checkpoint.pt"])
    assert load_checkpoint(tmp_path / "kept.pt", training=True)["steps"] >= 5
    assert main(["train", "--resume", "--meta-steps", "6", "--out", str(tmp_path / "kept" / "run"),
                 "--eval-tasks", "2"]) == 0  # fmt: skip


@pytest.mark.slow
def test_a_read_only_disk_is_a_one_line_error(tmp_path, small_disk):
    out = tmp_path / "disk" / "run"
    code, errors = small_disk(100, "train", *QUICK, "--out", out, options="ro")
    assert code == 1
    assert len(errors) == 1
    assert "Read-only file system" in errors[0]
