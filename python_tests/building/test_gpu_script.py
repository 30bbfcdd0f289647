"""`.ci/gpu`: a stage that fails, hangs or lacks time is reported, and the others still run."""

import argparse
import functools
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(check, tmp_path):
    """Run stages, given as (name, function, need, limit). Returns their records by name."""
    runner = check("runner")

    def run(*stages, minutes=1.0):
        of = runner.Run(tmp_path, minutes, {})
        for stage in stages:
            of.stage(runner.Stage(*stage))
        assert of.table().count("\n") == len(stages) - 1
        summary = json.loads((tmp_path / "summary.json").read_text())
        return {record["name"]: record for record in summary["stages"]}

    return run


def python(step, code, folder, **arguments):
    return step.command(sys.executable, "-c", code, cwd=folder, **arguments)


def passing(step):
    step.found["seen"] = True


def test_a_failing_stage_reports_why_and_does_not_stop_the_others(run, tmp_path):
    def failing(step):
        python(step, "print('before')\nraise ValueError('the reason')", tmp_path)

    def buggy(step):
        raise KeyError("a bug")

    records = run(("bad", failing, 0, 60), ("worse", buggy, 0, 60), ("good", passing, 0, 60))
    assert records["bad"]["outcome"] == "failed"
    assert records["bad"]["reason"] == "exit code 1: ValueError: the reason"
    assert records["worse"]["reason"] == "KeyError: 'a bug'"
    assert records["good"] == records["good"] | {"outcome": "passed", "seen": True, "reason": ""}
    log = (tmp_path / "log.txt").read_text()
    assert "before\nTraceback" in log


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A killed child is a zombie until init reaps it.
    state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


HANGING = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("child").write_text(str(child.pid))
print("waiting forever", flush=True)
time.sleep(600)
"""


def test_a_hanging_stage_is_stopped_with_its_child_processes(run, check, tmp_path, monkeypatch):
    monkeypatch.setattr(check("runner"), "GRACE", 0.1)

    def hanging(step):
        python(step, HANGING, tmp_path)

    start = time.monotonic()
    records = run(("hangs", hanging, 0, 5), ("next", passing, 0, 60))
    assert time.monotonic() - start < 60
    assert records["hangs"]["outcome"] == "failed"
    assert records["hangs"]["reason"] == "stopped after 5 s: waiting forever"
    assert not is_running(int((tmp_path / "child").read_text()))
    assert records["next"]["outcome"] == "passed"


SAVING = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
try:
    print("waiting", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path("saved").touch()
"""


def test_a_stopped_command_can_save_its_results(check, tmp_path, monkeypatch):
    runner = check("runner")
    monkeypatch.setattr(runner, "GRACE", 60.0)
    with subprocess.Popen(
        [sys.executable, "-c", SAVING], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "waiting\n"
        runner.interrupt(process)
    assert (tmp_path / "saved").exists()


def test_a_stage_is_left_out_if_too_little_time_is_left(run):
    records = run(("long", passing, 120, 600), ("short", passing, 10, 600), minutes=1.0)
    assert records["long"]["outcome"] == "left out"
    assert records["long"]["reason"].endswith("s are left, it needs about 120")
    assert records["short"]["outcome"] == "passed"


def test_the_total_time_limits_every_stage(run):
    left = []
    run(("long", lambda step: left.append(step.left()), 10, 600), minutes=0.5)
    assert 10 < left[0] <= 30


def test_a_part_that_fails_or_lacks_time_does_not_stop_the_other_parts(run, check):
    failed = check("runner").Failed

    def fail():
        raise failed("no such thing")

    def parts(step):
        step.attempt("first", 1, fail)
        step.attempt("too long", 1000, fail)
        step.attempt("last", 1, lambda: step.found.update(last=1))

    record = run(("parts", parts, 0, 60))["parts"]
    assert record["outcome"] == "failed"
    assert record["failures"] == {"first": "no such thing"}
    assert record["reason"] == "first: no such thing"
    assert record["no time for"] == ["too long"]
    assert record["last"] == 1


def test_the_summary_is_written_before_a_stage_ends(run, tmp_path):
    seen = []

    def reading(step):
        seen.append(json.loads((tmp_path / "summary.json").read_text())["stages"])

    run(("first", passing, 0, 60), ("second", reading, 0, 60))
    assert [(r["name"], r["outcome"]) for r in seen[0]] == [
        ("first", "passed"), ("second", "running"),
    ]  # fmt: skip


def test_the_beginning_and_the_end_of_a_long_output_are_logged(run, check, tmp_path):
    limit = check("runner").LOGGED
    code = f"print('first'); print('x' * {2 * limit}); print('last')"
    run(("loud", lambda step: python(step, code, tmp_path), 0, 60))
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < limit + 1000
    assert "\nfirst\n" in log
    assert log.endswith("\nlast\n")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a.cu(3): error: no such name\nninja: build stopped\nERROR: Failed", "a.cu(3): error: "),
        ("FAILED conv: off by 1\nok\n3 checks failed, 7 passed", "FAILED conv: off by 1"),
        ("RuntimeError: CUDA error\nthe end of it", "RuntimeError: CUDA error"),
        ("all is well\nit just ended", "it just ended"),
        ("", "no output"),
    ],
)
def test_the_line_that_explains_a_failure_is_found(check, output, line):
    assert check("runner").telling_line(output).startswith(line)


def test_failed_tests_are_reported_with_their_reasons(check, tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="test_ops" name="test_a[cuda]"/>'
        '<testcase classname="test_ops" name="test_b"><skipped message="no"/></testcase>'
        '<testcase classname="test_cg" name="test_c[cuda]">'
        '<failure message="assert 1 == 2&#10; where">long</failure></testcase>'
        "</testsuite></testsuites>"
    )
    assert check("stages").read_report(report) == {
        "passed": 1, "failed": 1, "skipped": 1,
        "failed tests": ["test_cg::test_c[cuda]: assert 1 == 2"],
    }  # fmt: skip


SANITIZER = """#!/bin/sh
[ "$1" = --tool ] && [ "$3" = --error-exitcode ] || exit 2
if [ "$2" = racecheck ]; then
  echo "========= Error: Race reported between Write access and Read access"
  echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
  exit $4
fi
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_every_sanitizer_tool_runs_and_the_first_error_is_reported(
    check, run, tmp_path, monkeypatch
):
    module, stages = check("place"), check("stages")
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module.Place, "installed", lambda place: {})
    place = module.Place(tmp_path, tmp_path, "cuda", "")
    sanitize = functools.partial(stages.sanitize, place)
    record = run(("sanitize", sanitize, 0, 60))["sanitize"]
    assert record["failures"] == {
        "racecheck": "exit code 9: ========= Error: Race reported between Write access and "
        "Read access"
    }
    for tool in ("memcheck", "synccheck", "initcheck"):
        assert record[tool] == "========= ERROR SUMMARY: 0 errors"


def test_a_failed_build_is_reported_although_a_wheel_is_installed_instead(
    check, run, tmp_path, monkeypatch
):
    module, stages = check("place"), check("stages")
    wheel = tmp_path / "root" / ".whl" / "imaml_ext-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("imaml_ext.py", "build_info = lambda: {'cuda': ''}")
        metadata = "Metadata-Version: 2.1\nName: imaml_ext\nVersion: 1.0"
        archive.writestr("imaml_ext-1.0.dist-info/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        archive.writestr("imaml_ext-1.0.dist-info/WHEEL", tags)
        archive.writestr("imaml_ext-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(stages, "ROOT", tmp_path / "root")  # contains nothing to build
    place = module.Place(tmp_path, tmp_path, "cpu", "")
    build = functools.partial(stages.build, place)
    record = run(("build", build, 0, 300))["build"]
    assert record["outcome"] == "failed"
    assert record["failures"]["the build"].startswith("exit code 1: ")
    assert record["installed instead"] == [wheel.name]
    assert record["file"] == str(site / "imaml_ext.py")
    assert place.installed()


class Parsed(Exception):
    """The script accepts its arguments."""


def test_the_scripts_accept_the_arguments_of_the_gpu_benchmarks(check, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, arguments=None, namespace=None):
        raise Parsed(parse(self, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    benchmarks = check("stages").BENCHMARKS
    assert len({one.result + one.note for one in benchmarks}) == len(benchmarks)
    for one in benchmarks:
        assert "-cuda" in one.result
        assert one.need > 0
        argv = [one.script, "--device", "cuda", *one.arguments, "--json", "x"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(Parsed) as parsed:
            __import__(one.script.removesuffix(".py")).main()
        assert parsed.value.args[0].json == Path("x")


def test_results_record_the_commit_of_the_sources(check, tmp_path):
    place = check("place").Place(tmp_path, tmp_path, "cpu", "abc")
    assert place.signed({"commit": "", "n": 1}) == {"commit": "abc", "n": 1}
    assert place.signed({"commit": "own"}) == {"commit": "own"}
    assert place.signed({"source": {"commit": ""}}) == {"source": {"commit": "abc"}}


def test_a_build_from_other_sources_is_refused(check, tmp_path):
    module = check("place")
    place = module.Place(tmp_path, tmp_path, "cpu", "")
    with pytest.raises(check("runner").Failed, match="nothing is installed"):
        place.installed()
    place.site.mkdir()
    mark = place.site / ".built-from"
    mark.write_text(module.digest())
    assert place.installed()["PYTHONPATH"] == str(place.site)
    mark.write_text("other")
    with pytest.raises(check("runner").Failed, match="the sources have changed"):
        place.installed()


def test_at_most_eight_result_files_are_written(check, run, tmp_path):
    place = check("place").Place(tmp_path, tmp_path, "cpu", "")
    assert len(set(place.FILES)) <= 8
    with pytest.raises(ValueError, match=r"must be one of .*, got another"):
        place.output("another")
    run(("first", passing, 0, 60))
    assert {path.name for path in tmp_path.iterdir()} <= set(place.FILES)


def test_the_results_and_checkpoints_of_a_training_are_kept(check, tmp_path):
    stages, runner = check("stages"), check("runner")
    place = check("place").Place(tmp_path, tmp_path / "out", "cuda", "abc")
    place.out.mkdir()
    folder = tmp_path / "train"
    (folder / "results").mkdir(parents=True)
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "checkpoint.pt").write_bytes(b"weights")
    line = {"accuracy": 97.0, "source": {"commit": "", "device": "card"}}
    (folder / "results" / "table2.jsonl").write_text(json.dumps(line) + "\n")
    step = runner.Step(tmp_path / "log", time.monotonic() + 60)
    stages.keep_training(place, step, folder)
    kept = json.loads((place.out / "table2.jsonl").read_text())
    assert kept == {"accuracy": 97.0, "source": {"commit": "abc", "device": "card"}}
    with tarfile.open(place.out / "train.tar.gz") as archive:
        assert archive.extractfile("runs/a/checkpoint.pt").read() == b"weights"
    assert not step.failures
