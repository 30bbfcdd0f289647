"""The benchmarks run, refuse to time what differs, and their page is made from their results."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import imaml_ext

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the sources are not here")


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the folder, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script, *arguments, folder):
    """What a script says, and the results it has written."""
    results = folder / "results.json"
    package = Path(imaml_ext.__file__).parents[1]  # the one under test, installed or not
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments, "--rounds", "1", "--json", results],
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran, json.loads(results.read_text())


SMALL = {
    "bench_cg.py": ("--tasks", "2", "--dim", "1000", "--without", "compiled"),
    "bench_prox.py": (
        "--tasks",
        "2",
        "--dim",
        "1000",
        "--step",
        "adam",
        "--without",
        "compiled",
        "JAX",
    ),
    "bench_meta_grad.py": (
        *("--workload", "sinusoid", "--tasks", "2", "--inner-steps", "2", "--cg-steps", "2"),
        *("--without", "compiled", "recorded", "linearize"),
    ),
}


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_of_times_runs_and_its_table_names_everything(script, benchmark, tmp_path):
    _, results = run(script, *SMALL[script], folder=tmp_path)
    rows = results["implementations"]
    assert len(rows) >= 3
    assert next(iter(rows)) == "imaml_ext"
    for row in rows.values():
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row.get("share_of_matmul", row.get("share_of_copy_bandwidth")) > 0
    page = benchmark("tables").make([results])
    assert all(name in page for name in rows)
    assert page.count("CUDA: not measured") == 1
    assert results["command"] in page


def test_memory_is_flat_for_implicit_gradients_and_grows_for_maml(benchmark, tmp_path):
    _, results = run(
        "bench_memory.py", "--workload", "omniglot-5w1s", "--width", "8", "--tasks", "2",
        "--inner-steps", "1", "8", "--cg-steps", "1", "4", "--without", "JAX", "TorchOpt",
        folder=tmp_path,
    )  # fmt: skip
    rows = results["implementations"]
    flat, grows = rows["imaml_ext"], rows["MAML, back-propagation through the steps"]
    assert flat["over_inner_steps"]["8"] < 1.05 * flat["over_inner_steps"]["1"]
    assert flat["over_cg_steps"]["4"] < 1.05 * flat["over_cg_steps"]["1"]
    assert grows["over_inner_steps"]["8"] > 3 * grows["over_inner_steps"]["1"]
    page = benchmark("tables").make([results])
    assert all(name in page for name in rows)


def test_the_launches_of_a_cg_iteration_do_not_depend_on_anything(benchmark, tmp_path):
    picture = tmp_path / "curves.png"
    _, results = run(
        "bench_scaling.py", "--workload", "sinusoid", "--tasks", "1", "2", "--widths", "32", "40",
        "--steps", "1", "2", "--dims", "64", "1000", "--png", str(picture), folder=tmp_path,
    )  # fmt: skip
    assert results["launches_per_iteration"] == 1
    assert set(results["fits"]) == set(results["series"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "results/curves.png" in benchmark("tables").make([results])


def make_wheel(folder):
    """The smallest that pip installs: one module of 1000 bytes."""
    information = "nothing-1.0.dist-info"
    path = folder / "nothing-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing.py", "#" * 1000)
        archive.writestr(f"{information}/METADATA", metadata)
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{information}/RECORD", "")
    return path


def test_the_cost_of_the_package_is_measured_and_its_table_has_it(benchmark, tmp_path):
    wheel = make_wheel(tmp_path)
    _, results = run(
        "bench_package.py", "--installs", "1",
        "--archive", f"a wheel={wheel}", f"a file={__file__}", folder=tmp_path,
    )  # fmt: skip
    plain, both = results["imports"].values()
    assert plain["cpu"]["median"] > 0.1  # torch was imported
    assert results["added"]["cpu"] == both["cpu"]["median"] / plain["cpu"]["median"] - 1
    assert 0 < results["added_within"]["median"] < 1
    measured = results["archives"]["a wheel"]
    assert measured["bytes"] == wheel.stat().st_size
    assert measured["files"] == 4
    assert 1000 < measured["installed_bytes"] < 1200
    assert measured["install"]["median"] > 0
    page = benchmark("tables").make([results])
    assert "| a wheel | 0.00 | 0.00 | 4 |" in page
    assert results["command"] in page


def test_of_each_installed_row_the_last_outcome_is_in_the_table(benchmark):
    def line(way, outcome, reason, **found):
        row = {"python": "3.11", "torch": "newest", "way": way, "kernels": "cpu", "built_with": ""}
        return {
            "name": way, "row": row, "outcome": outcome, "reason": reason, "seconds": {},
            "platform": "Linux", "commit": found.pop("commit"), "date": "2026-01-02T03", **found,
        }  # fmt: skip

    page = benchmark("tables").installs(
        [
            line("uv", "failed", "no compiler", commit="aaa"),
            line("pip", "failed", "no network", commit="bbb"),
            line("uv", "works", "", commit="ccc", torch="2.15.0", python="3.11.7"),
        ]
    )
    assert "| 3.11.7 | 2.15.0 | uv | CPU | works |  | ccc |" in page
    assert "| 3.11 | newest | pip | CPU | **failed** |  | bbb |" in page
    assert "- pip: no network" in page
    assert "no compiler" not in page
    assert "Linux, 2026-01-02\n" in page


def test_a_process_that_fails_is_not_timed(benchmark):
    with pytest.raises(SystemExit, match="exit status 3"):
        benchmark("bench_package").run(sys.executable, "-c", "raise SystemExit(3)")


def test_the_processor_time_is_that_of_the_process(benchmark):
    run = benchmark("bench_package").run
    idle = run(sys.executable, "-c", "import time; time.sleep(0.5)")
    busy = run(sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass")
    assert idle < 0.5 <= busy


def test_what_differs_is_not_timed(benchmark):
    harness = benchmark("harness")
    right, wrong = torch.ones(3), torch.tensor([1.0, 1.0, 1.001])
    with pytest.raises(SystemExit, match="wrong differs by"):
        harness.check_agreement({"right": lambda: right, "wrong": lambda: wrong}, int, 1e-5)
    with pytest.raises(SystemExit, match="nan"):
        harness.check_agreement({"right": lambda: right, "nan": lambda: right / 0 * 0}, int, 1e-5)


def test_a_result_in_a_buffer_that_others_write_is_compared_as_it_was(benchmark):
    buffer = torch.ones(3, dtype=torch.float64)
    with pytest.raises(SystemExit, match="second differs"):
        benchmark("harness").check_agreement(
            {"first": lambda: buffer, "second": lambda: buffer.fill_(2.0)}, int, 1e-5
        )


def test_a_peer_that_is_not_installed_is_said_to_be_left_out(benchmark, monkeypatch, capsys):
    harness = benchmark("harness")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert not harness.has_peer("torchopt")
    assert "left out, not installed: TorchOpt" in capsys.readouterr().err


def test_the_flops_of_a_gradient_are_those_of_its_layers(benchmark):
    workload = benchmark("workload").make_workload(
        "sinusoid", torch.device("cpu"), torch.float32, inner_steps=3, cg_steps=0, tasks=2, width=8
    )
    layers = [2 * 10 * fan_in * fan_out for fan_in, fan_out in ((1, 8), (8, 8), (8, 1))]
    # Outputs, gradients of the weights, and of the inputs but the first layer's.
    gradient = 3 * sum(layers) - layers[0]
    assert benchmark("bench_meta_grad").count_flops(workload) == 2 * (3 + 2) * gradient


def test_the_power_and_the_line_are_found(benchmark):
    fit = benchmark("bench_scaling").fit
    assert fit("tasks B", [(n, 3 * n**1.5) for n in (1, 2, 4)])["power"] == pytest.approx(1.5)
    line = fit("CG steps", [(n, 0.5 + 0.1 * n) for n in (1, 2, 4)])
    assert line == {"start": pytest.approx(0.5), "each": pytest.approx(0.1)}


def test_the_page_is_made_from_the_committed_results(benchmark):
    tables = benchmark("tables")
    page = tables.make(tables.committed(), tables.committed_matrix())
    assert (BENCHMARKS / "README.md").read_text() == page
