"""A group of processes that share the tasks trains as one process with all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from group_trainings import DOCS, TASKS, TRAININGS, by_hand, trained

from imaml_ext.cli import main
from imaml_ext.training.checkpoint import load_checkpoint

HELPERS = Path(__file__).parents[1] / "helpers"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module", params=[2, 3])
def group(request, tmp_path_factory):
    """The results of group_trainings.py on 2 or 3 processes, by rank."""
    folder = tmp_path_factory.mktemp("group")
    script = HELPERS / "group_trainings.py"
    run = subprocess.run(
        [*TORCHRUN, "--standalone", f"--nproc-per-node={request.param}", str(script), str(folder)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.slow
@pytest.mark.usefixtures("adam_capturable_on_the_cpu_too")
@pytest.mark.parametrize("name", list(TRAININGS))
def test_a_group_trains_as_one_process(name, group):
    expected = trained(TRAININGS[name], None)
    for results in group:
        got = results[name]
        for a, b in zip(got["state"], expected["state"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        for a, b in zip(got["records"], expected["records"], strict=True):
            assert a == pytest.approx(b, rel=1e-9, nan_ok=True)


@pytest.mark.slow
def test_every_process_ends_with_the_same_bits(group):
    for name in TRAININGS:
        for results in group[1:]:
            assert repr(results[name]["records"]) == repr(group[0][name]["records"])
            for a, b in zip(results[name]["state"], group[0][name]["state"], strict=True):
                assert torch.equal(a, b)


@pytest.mark.slow
def test_every_process_refuses_a_step_and_the_one_with_the_failed_task_names_it(group):
    size = len(group)
    owner = next(r for r in range(size) if (r + 1) * TASKS // size > 5)
    local = 5 - owner * TASKS // size
    for rank, results in enumerate(group):
        refused = results["refused"]
        assert refused["steps"] == 3
        assert refused["unchanged"]
        assert f"On rank {rank} of {size}: " in refused["message"]
        named = (
            f"NONFINITE: 1 of {(rank + 1) * TASKS // size - rank * TASKS // size} tasks: {local}"
        )
        assert (named in refused["message"]) == (rank == owner)


@pytest.mark.slow
def test_a_number_that_differs_from_that_of_rank_0_is_refused(group):
    expected = [f"the number is {rank} on rank {rank}, but 0 on rank 0" for rank in (1, 2)]
    assert [results["mismatch"] for results in group] == [None, *expected[: len(group) - 1]]


@pytest.mark.slow
@pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")
def test_a_plain_loop_that_averages_as_documented_trains_as_one_process(group):
    expected = by_hand(None)
    for results in group:
        for got, first, want in zip(results["by hand"], group[0]["by hand"], expected, strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it(group):
    """One that releases a tensor while Python exits aborts the process."""
    for results in group:
        assert results["threads"]
        assert not [name for name in results["threads"] if "gloo" in name]


@pytest.mark.slow
def test_processes_that_exit_after_their_last_reduction_do_not_abort():
    done = subprocess.run(
        [sys.executable, "leaving.py", "2"], env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300, cwd=HELPERS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"exited": 6, "failed": 0}, done.stderr


# ---- The command line under torchrun ---------------------------------------------------------

TRAIN = ["train", "--tasks", "5", "--inner-steps", "2", "--device", "cpu", "--eval-tasks", "5"]


def torchrun(processes, *arguments, restarts=0, rendezvous=("--standalone",)):
    return subprocess.Popen(
        [
            *TORCHRUN, *rendezvous, f"--nproc-per-node={processes}", f"--max-restarts={restarts}",
            "--monitor-interval=0.1", "-m", "imaml_ext", *map(str, arguments),
        ],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=HELPERS,  # has no imaml_ext that would be imported instead
    )  # fmt: skip


def finished(run, code=0):
    out, error = run.communicate(timeout=300)
    assert run.returncode == code, error
    return out, error


def workers(run):
    """Process ids of the ranks, without forks of torchrun that have not started Python yet."""
    found = []
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        with suppress(OSError):  # the process has ended
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"imaml_ext" in command and b"torch.distributed.run" not in command:
                found.append(int(child))
    return found


def kill_worker(run):
    """Kill the only worker of this torchrun, as soon as there is one."""
    end = time.monotonic() + 60
    while len(found := workers(run)) != 1:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)


def wait_for_step(run, folder, step, *, saved):
    """Wait until the log has this step and, if `saved`, there is a checkpoint."""
    log, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"
    end = time.monotonic() + 300
    while run.poll() is None and time.monotonic() < end:
        logged = log.exists() and f'"step": {step},' in log.read_text()
        if logged and (checkpoint.exists() or not saved):
            return
        time.sleep(0.02)
    run.kill()
    raise AssertionError(run.communicate()[1])


def learned(folder):
    return load_checkpoint(folder / "checkpoint.pt")["learned"]


@pytest.mark.slow
def test_torchrun_trains_as_one_process_and_reports_once(tmp_path):
    steps = ["--meta-steps", "5", "--json"]
    out, _ = finished(torchrun(2, *TRAIN, *steps, "--out", tmp_path / "group"))
    assert main([*TRAIN, *steps, "--out", str(tmp_path / "one")]) == 0
    one = learned(tmp_path / "one")
    for name, tensor in learned(tmp_path / "group").items():
        # Adam's first steps are as large as its rate, 1e-3, for gradients of any size.
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=1e-4)
    reports = [line for line in out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["meta_steps"] for line in reports] == [5]
    lines = (tmp_path / "group" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train" in line] == [1, 2, 3, 4, 5]


STEPS = 120  # half of them are left when the last process is killed
LONG = ["--meta-steps", str(STEPS), "--save-every", "0.05", "--validations", "1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(torchrun(2, *TRAIN, *LONG, "--out", folder))
    return learned(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_ranks_that_are_killed_do_not_change_the_result(undisturbed, tmp_path):
    """Two torchruns of one process each, as on two machines: each notices the other's failure."""
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    runs = [
        torchrun(1, *TRAIN, *LONG, "--out", tmp_path, "--resume", restarts=3, rendezvous=rendezvous)
        for _ in range(2)
    ]
    for victim, step in ((1, 20), (0, 60)):
        wait_for_step(runs[victim], tmp_path, step, saved=True)
        kill_worker(runs[victim])
    errors = "".join(finished(run)[1] for run in runs)
    assert errors.count("resuming from meta-step") >= 2  # torchrun may restart once more
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in learned(tmp_path).items())


@pytest.mark.slow
def test_an_existing_run_is_resumed_only_on_request(tmp_path):
    before = (tmp_path / "checkpoint.pt", b"of another run")
    before[0].write_bytes(before[1])
    _, error = torchrun(2, *TRAIN, "--out", tmp_path, restarts=1).communicate(timeout=300)
    assert "checkpoint.pt exists: resume it with --resume" in error
    assert before[0].read_bytes() == before[1]


@pytest.mark.slow
def test_a_group_that_is_stopped_saves_its_last_step(undisturbed, tmp_path):
    run = torchrun(2, *TRAIN, *LONG, "--save-every", "1000", "--out", tmp_path)
    wait_for_step(run, tmp_path, 3, saved=False)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=300)
    assert "to resume: repeat the command with --resume" in error
    assert 0 < load_checkpoint(tmp_path / "checkpoint.pt")["steps"] < STEPS
    finished(torchrun(2, *TRAIN, *LONG, "--out", tmp_path, "--resume"))
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in learned(tmp_path).items())


def test_torchrun_needs_a_folder_for_the_checkpoint(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as under torchrun")
    assert main(TRAIN) == 1
    assert "imaml-ext: error: torchrun needs --out" in capsys.readouterr().err
