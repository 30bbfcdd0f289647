"""The benchmarks run, and their page is generated from their results."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import imaml_ext

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the sources are not here")


def run(script, *arguments, folder):
    """Run a script. Returns the process and the results that it wrote."""
    results = folder / "results.json"
    package = Path(imaml_ext.__file__).parents[1]  # the package under test
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


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_timing_benchmark_runs_and_its_table_has_every_row(script, benchmark, tmp_path):
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_cg_iteration_is_one_launch_at_every_size(benchmark, tmp_path):
    picture = tmp_path / "curves.png"
    _, results = run(
        "bench_scaling.py", "--workload", "sinusoid", "--tasks", "1", "2", "--widths", "32", "40",
        "--steps", "1", "2", "--dims", "64", "1000", "--png", str(picture), folder=tmp_path,
    )  # fmt: skip
    assert results["launches_per_iteration"] == 1
    assert set(results["fits"]) == set(results["series"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "results/curves.png" in benchmark("tables").make([results])


@pytest.mark.slow
def test_the_arithmetic_of_a_head_is_counted_by_part(benchmark, tmp_path):
    way, query, width = 3, 2, 4
    _, results = run(
        "bench_heads.py", "--tasks", "1", "2", "--way", str(way), "--query", str(query),
        "--width", str(width), folder=tmp_path,
    )  # fmt: skip
    on_features, anil = results["methods"].values()
    sides = (14, 7, 4, 2)  # the output of each convolution
    first, *others = [
        side**2 * 9 * fan_in * width for side, fan_in in zip(sides, (1, 4, 4, 4), strict=True)
    ]
    images = way * (1 + query)
    forward = images * (first + sum(others))
    # The backward pass: by the weights, and by the inputs but the images.
    backward = images * (first + 2 * sum(others))
    assert on_features["body: forward"]["multiply_adds"] == [forward, 2 * forward]
    assert on_features["body: backward"]["multiply_adds"] == [backward, 2 * backward]
    assert anil["body: forward"]["multiply_adds"][0] > 2 * forward  # in each evaluation
    assert all(min(row["seconds"]) > 0 for row in (on_features | anil).values())
    page = benchmark("tables").make([results])
    assert all(page.count(f"| {part} |") == 1 + (part in anil) for part in on_features)


def make_wheel(folder):
    """A minimal wheel: one module of 1000 bytes."""
    information = "nothing-1.0.dist-info"
    path = folder / "nothing-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing.py", "#" * 1000)
        archive.writestr(f"{information}/METADATA", metadata)
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{information}/RECORD", "")
    return path


@pytest.mark.slow
def test_the_package_benchmark_measures_imports_and_archives(benchmark, tmp_path):
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


def test_the_table_of_installs_has_the_last_outcome_of_each_row(benchmark):
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
            line(
                "release wheel",
                "works",
                "",
                commit="ddd",
                torch="2.15.0",
                python="3.12.1",
                wheel="name-1.whl",
                wheel_bytes=1_234_000,
            ),
        ]
    )
    assert "| 3.11.7 | 2.15.0 | uv | CPU | works |  | ccc |" in page
    assert "| 3.11 | newest | pip | CPU | **failed** |  | bbb |" in page
    assert "- pip: no network" in page
    assert "no compiler" not in page
    assert "| `name-1.whl` | 1.23 | Python 3.12.1, torch 2.15.0 | ddd |" in page
    assert "Linux, 2026-01-02\n" in page


def test_a_failing_process_is_not_timed(benchmark):
    with pytest.raises(SystemExit, match="exit status 3"):
        benchmark("bench_package").run(sys.executable, "-c", "raise SystemExit(3)")


def test_the_cpu_time_is_that_of_the_process(benchmark):
    run = benchmark("bench_package").run
    idle = run(sys.executable, "-c", "import time; time.sleep(0.5)")
    busy = run(sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass")
    assert idle < 0.5 <= busy


def test_the_flops_of_a_gradient_are_those_of_its_layers(benchmark):
    workload = benchmark("workload").make_workload(
        "sinusoid", torch.device("cpu"), torch.float32, inner_steps=3, cg_steps=0, tasks=2, width=8
    )
    layers = [2 * 10 * fan_in * fan_out for fan_in, fan_out in ((1, 8), (8, 8), (8, 1))]
    # Outputs, gradients of the weights, and of the inputs but the first layer's.
    gradient = 3 * sum(layers) - layers[0]
    assert benchmark("bench_meta_grad").count_flops(workload) == 2 * (3 + 2) * gradient


def test_scaling_fits_a_power_law_and_a_line(benchmark):
    fit = benchmark("bench_scaling").fit
    assert fit("tasks B", [(n, 3 * n**1.5) for n in (1, 2, 4)])["power"] == pytest.approx(1.5)
    line = fit("CG steps", [(n, 0.5 + 0.1 * n) for n in (1, 2, 4)])
    assert line == {"start": pytest.approx(0.5), "each": pytest.approx(0.1)}


def test_the_page_is_generated_from_the_committed_results(benchmark):
    tables = benchmark("tables")
    page = tables.make(tables.committed(), tables.committed_installs())
    assert (BENCHMARKS / "README.md").read_text() == page


def test_the_readme_has_the_committed_times(benchmark):
    readme = BENCHMARKS.parent / "README.md"
    written = benchmark("readme_rows").replaced(readme.read_text(), benchmark("tables").committed())
    assert readme.read_text() == written


def made_up(benchmark, settings, device_type="cuda", **milliseconds):
    """A result with these medians."""
    rows = {
        name: {"median": 1e-3 * t, "min": 0.0, "max": 1.0, "share_of_copy_bandwidth": 0.08 / t}
        for name, t in milliseconds.items()
    }
    return {
        "benchmark": benchmark, "device_type": device_type, "device": f"Some {device_type}",
        "command": "cmd", "commit": "abc", "threads": 2, "torch": "2.11.0", "date": "2026-01-02T03",
        "settings": settings, "copy_bandwidth": 3e12, "implementations": rows,
    }  # fmt: skip


def test_results_of_a_gpu_are_added_to_the_page(benchmark, tmp_path):
    settings = {"tasks": 16, "dim": 113221, "iterations": 5, "dtype": "float32"}
    result = made_up(
        "cg", settings,
        **{"imaml_ext": 0.2, "imaml_ext, CUDA graph": 0.1, "JAX, jit": 0.45, "plain": 0.9},
    )  # fmt: skip
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "installs.jsonl").write_text("")
    rows = benchmark("readme_rows")
    (tmp_path / "README.md").write_text(f"before\n{rows.BEGIN}old\n{rows.END}after\n")
    merged = tmp_path / "bench.json"
    merged.write_text(json.dumps({"cg-cuda-b16.json": result}))
    benchmark("tables").main(["--add", str(merged)], root=tmp_path)
    assert json.loads((folder / "results" / "cg-cuda-b16.json").read_text()) == result
    page = (folder / "README.md").read_text()
    assert "CPU: not measured.\n\nCUDA:\n" in page
    assert "| **imaml_ext** | 0.2 | 1.00 | 40% |" in page
    assert "Some cuda" in page
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith(f"{rows.END}after\n")
    assert "old" not in readme


def test_the_readme_compares_with_the_fastest_variant_of_each_implementation(benchmark):
    section = benchmark("readme_rows").section
    settings = {"workload": "omniglot-5w1s", "tasks": 16}
    rows = {
        "imaml_ext": 4.0, "imaml_ext, recorded": 2.0, "batched PyTorch, eager": 9.0,
        "batched PyTorch, CUDA graph": 3.0, "lean loop over tasks": 60.0, "JAX, vmap": 5.0,
    }  # fmt: skip
    cuda = made_up("meta_grad", settings, **rows)
    cpu = made_up("meta_grad", settings, "cpu", **rows)
    tf32 = made_up("meta_grad", settings | {"tf32": True}, imaml_ext=1.0)
    ratios = "2 ms | 1.5x | 2.5x |  | 30x |"
    task = "| Omniglot 5-way 1-shot, 16 tasks"
    *_, first, second = section([cuda, tf32, cpu]).splitlines()
    assert first == f"{task} | Some cpu, 2 cores | {ratios}"
    assert second == f"{task} | Some cuda | {ratios}"
    assert section([cpu]).endswith("\n\nNot yet measured on a GPU.\n")
