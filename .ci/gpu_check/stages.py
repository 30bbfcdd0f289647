"""The stages of .ci/gpu."""

import dataclasses
import importlib.util
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from gpu_check.omniglot_like import write_omniglot_like
from gpu_check.place import HERE, PYTHON, ROOT, Place, digest, last_json
from gpu_check.runner import Failed, LeftOut, Stage, Step

DIMS = ("17", "4097", "113221", "462848", "500000")
# One block, a cluster of 2, one of 16, three launches.
DIMS_SANITIZED = ("17", "4097", "113221", "500000")
DIMS_REHEARSED = ("17", "4097")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHOWN = 40  # failures in the summary
LARGEST = 16 * 2**20  # bytes of one result file

ABOUT_DEVICE = """
import json, os, torch
found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cpus": os.cpu_count()}
if torch.cuda.is_available():
    of = torch.cuda.get_device_properties(0)
    found |= {"device": of.name, "capability": f"{of.major}.{of.minor}", "L2": of.L2_cache_size,
              "multiprocessors": of.multi_processor_count, "memory": of.total_memory,
              "cudnn": torch.backends.cudnn.version()}
print(json.dumps(found))
"""

ABOUT_BUILD = """
import json, imaml_ext
print(json.dumps({"file": imaml_ext.__file__, "build": imaml_ext.build_info()}))
"""


def info(place: Place, step: Step) -> None:
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem"
    for program, *arguments in (["nvidia-smi", query, "--format=csv"], ["nvcc", "--version"]):
        if shutil.which(program):
            output = step.command(program, *arguments, cwd=place.work, limit=15)
            step.found[program] = output.strip().splitlines()[-1]
    step.found |= last_json(step.command(PYTHON, "-c", ABOUT_DEVICE, cwd=place.work))
    if not place.rehearse and "device" not in step.found:
        raise Failed(f"torch {step.found['torch']} finds no GPU")


def build(place: Place, step: Step) -> None:
    """Build for this device only, into place.site; if that fails, install a wheel."""
    shutil.rmtree(place.site, ignore_errors=True)
    settings = {"IMAML_CUDA": "auto"}
    if not place.rehearse:
        about = last_json(step.command(PYTHON, "-c", ABOUT_DEVICE, cwd=place.work))
        if "capability" not in about:
            raise Failed(f"torch {about['torch']} finds no GPU to build for")
        settings = {"IMAML_CUDA": "on", "TORCH_CUDA_ARCH_LIST": about["capability"]}
    pip = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    pip += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(place.site)]
    try:
        step.command(*pip, "-v", ROOT, cwd=place.work, env=settings)
    except Failed as failure:
        wheels = sorted((ROOT / ".whl").glob("imaml_ext-*.whl"))
        if not wheels:
            raise
        step.failures["the build"] = str(failure)
        shutil.rmtree(place.site, ignore_errors=True)
        step.command(*pip, "--find-links", ROOT / ".whl", "imaml_ext", cwd=place.work)
        step.found["installed instead"] = [wheel.name for wheel in wheels]
    environment = place.environment
    step.found |= last_json(
        step.command(PYTHON, "-c", ABOUT_BUILD, cwd=place.work, env=environment)
    )
    if not Path(step.found["file"]).is_relative_to(place.site):
        raise Failed(f"Python imports {step.found['file']}, not the installed package")
    if not place.rehearse and not step.found["build"]["cuda"]:
        raise Failed("the installed package has no CUDA kernels")
    (place.site / ".built-from").write_text(digest())


def smoke(place: Place, step: Step) -> None:
    dims = DIMS_REHEARSED if place.rehearse else DIMS
    command = [PYTHON, HERE / "smoke.py", "--device", place.device, "--dims", *dims]
    try:
        output = step.command(*command, cwd=place.work, env=place.installed())
    except Failed as failure:
        lines = [line for line in failure.output.splitlines() if line.startswith("FAILED")]
        step.found["failed checks"] = lines[:SHOWN]
        raise
    step.found |= last_json(output)


def tests(place: Place, step: Step) -> None:
    """The tests with "cuda" in their names or parameters, with the installed package."""
    suite, report = ROOT / "python_tests", place.output("tests.xml")
    report.unlink(missing_ok=True)
    selection = ["-k", "cuda and not packaging and not cuda_compiler", suite]
    if place.rehearse:
        selection = [
            "-k",
            "cpu and float64",
            suite / "ops/test_cg_step.py",
            suite / "solvers/test_cg.py",
        ]
    command = [PYTHON, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command += ["-m", "", "-v", "--tb=short", f"--junit-xml={report}"]
    # pytest-benchmark, if installed, warns under pytest-xdist; a warning is an error here.
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    if importlib.util.find_spec("xdist"):
        # The tests are limited by the host rather than by the GPU, which processes can share.
        command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        # A thread ends the process; a signal would not interrupt waiting for the device.
        command += ["--timeout=60", "--timeout-method=thread"]
        # Interrupted, pytest-xdist writes no report. So that it ends before the stage does:
        command += [f"--session-timeout={max(30, step.left() - 25):.0f}"]
    environment = place.installed() | {"OMP_NUM_THREADS": "1"}
    try:
        step.command(*command, *selection, cwd=place.folder("tests"), env=environment)
    finally:
        if report.is_file():
            step.found |= read_report(report)
    if step.found.get("passed", 0) == 0:
        raise Failed(f"no test passed: {step.found}")


def read_report(report: Path) -> dict[str, object]:
    """Counts, and the failed tests with their reasons."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        if bad:
            reason = (bad[0].get("message") or "").strip().partition("\n")[0]
            reasons.append(f"{case.get('classname')}::{case.get('name')}: {reason}"[:300])
    return {**counts, "failed tests": reasons[:SHOWN]}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A run of a script of benchmarks/; a later run with the same result replaces it.

    Attributes:
        result: file name of the result, without extension.
        need: estimated seconds on an H100; the run is stopped after twice as long.
    """

    result: str
    need: float
    script: str
    arguments: tuple[str, ...]
    note: str = ""


NO_JAX = ("--without", "compiled", "JAX", "linear_operator")


def meta_grad(workload: str, need: float, *without: str, note: str = "") -> Benchmark:
    """Without variants that compile for long, and without TorchOpt, one of several task loops."""
    arguments = ("--workload", workload, "--rounds", "3", "--errors")
    arguments += ("--without", "compiled", "TorchOpt", *without)
    return Benchmark(f"meta_grad-cuda-{workload}", need, "bench_meta_grad.py", arguments, note)


# In order of value. XLA takes minutes to compile convolutions of JAX, but not products of patches;
# torch.compile comes last.
BENCHMARKS = (
    meta_grad("omniglot-5w1s", 60, "lax.conv"),
    Benchmark("cg-cuda-b16", 20, "bench_cg.py", ("--rounds", "10", *NO_JAX)),
    meta_grad("sinusoid", 25),
    Benchmark("prox-gd-cuda", 20, "bench_prox.py", ("--step", "gd", "--rounds", "10", *NO_JAX)),
    meta_grad("omniglot-20w5s", 50, "lax.conv", "forward over reverse"),
    meta_grad("omniglot-20w1s", 45, "lax.conv", "forward over reverse"),
    Benchmark(
        "memory-cuda", 20, "bench_memory.py",
        ("--inner-steps", "1", "4", "16", "--cg-steps", "1", "4", "8", "--without", "JAX"),
    ),
    Benchmark("prox-adam-cuda", 20, "bench_prox.py", ("--step", "adam", "--rounds", "10", *NO_JAX)),
    Benchmark("cg-cuda-b64", 25, "bench_cg.py", ("--tasks", "64", "--rounds", "5", *NO_JAX)),
    Benchmark("cg-cuda-b16", 40, "bench_cg.py", ("--rounds", "10"), " with JAX"),
    Benchmark("prox-gd-cuda", 30, "bench_prox.py", ("--step", "gd", "--rounds", "10"), " with JAX"),
)  # fmt: skip
SMALL = ("--tasks", "2", "--rounds", "1")
FAST = ("--without", "compiled", "recorded", "JAX", "TorchOpt", "linear_operator")
STEPS = ("--inner-steps", "2", "--cg-steps", "2")
BENCHMARKS_REHEARSED = (
    Benchmark("cg-cpu", 0, "bench_cg.py", (*SMALL, "--dim", "1000", *FAST)),
    Benchmark("prox-gd-cpu", 0, "bench_prox.py", (*SMALL, "--dim", "1000", *FAST)),
    Benchmark(
        "meta_grad-cpu-sinusoid", 0, "bench_meta_grad.py",
        ("--workload", "sinusoid", *SMALL, *STEPS, *FAST),
    ),
    Benchmark(
        "memory-cpu", 0, "bench_memory.py", ("--workload", "sinusoid", *SMALL, *STEPS, *FAST)
    ),
)  # fmt: skip


def bench(place: Place, step: Step) -> None:
    """Each benchmark in its own process; the results so far are merged after each."""
    environment, folder = place.installed(), place.folder("bench")
    shutil.rmtree(folder / "results", ignore_errors=True)
    merged = place.output("bench.json")
    merged.unlink(missing_ok=True)
    results = {}

    def measure(one: Benchmark) -> None:
        result = Path("results") / f"{one.result}.json"
        # A JAX that sees no GPU is left out before it reserves any of its memory.
        variables = environment | ({"JAX_PLATFORMS": "cpu"} if "JAX" in one.arguments else {})
        step.command(
            PYTHON, ROOT / "benchmarks" / one.script, "--device", place.device, *one.arguments,
            "--json", result, cwd=folder, env=variables, limit=2 * one.need or float("inf"),
        )  # fmt: skip
        results[result.name] = place.signed(json.loads((folder / result).read_text()))
        merged.write_text(json.dumps(results, indent=1) + "\n")

    for one in BENCHMARKS_REHEARSED if place.rehearse else BENCHMARKS:
        step.attempt(one.result + one.note, one.need, partial(measure, one))
    step.found["measured"] = list(results)


def sanitize(place: Place, step: Step) -> None:
    """The operators under each tool of compute-sanitizer."""
    dims = DIMS_REHEARSED if place.rehearse else DIMS_SANITIZED
    program = [PYTHON, HERE / "smoke.py", "--operators-only", "--device", place.device]
    program += ["--dims", *dims]
    # Every tensor gets its own allocation, so that an access out of bounds is detected.
    environment = place.installed() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if place.rehearse:
        step.command(*program, cwd=place.work, env=environment)
        return
    if shutil.which("compute-sanitizer") is None:
        raise Failed("compute-sanitizer is not on the PATH")

    def under(tool: str) -> None:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
        output = step.command(*command, cwd=place.work, env=environment, limit=90)
        step.found[tool] = next(
            (line for line in reversed(output.splitlines()) if "SUMMARY" in line), "no summary"
        )

    for tool in SANITIZERS:
        step.attempt(tool, 10, partial(under, tool))


def train(
    place: Place, step: Step, *, cells: list[str], methods: list[str], minutes: float, data: Path
) -> None:
    """Train cells of table 2 from the features in results/models.

    What is trained before the stage is stopped is kept.
    """
    environment, folder = place.installed(), place.work / "train"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    length = ["--budget", str(minutes)]
    if place.rehearse:
        data = folder / "data"
        write_omniglot_like(data)
        environment = environment | {"XDG_CACHE_HOME": str(folder / "cache")}
        length = ["--meta-steps", "100", "--eval-tasks", "4"]
    elif not (data / "omniglot-py").is_dir():
        raise LeftOut(f"no omniglot-py in {data}: pass its folder as --data")
    command = [PYTHON, "-m", "imaml_ext", "reproduce", "table2", "--json", "--data", data]
    features = ROOT / "results" / "models" / "omniglot-features-hard.pt"
    if not features.is_file():
        raise LeftOut(f"no {features}, which takes 45 minutes to train")
    (folder / "results" / "models").mkdir(parents=True)
    shutil.copy(features, folder / "results" / "models")
    command += ["--variant", "features", "--device", place.device]
    command += ["--out", "results", "--runs", "runs", *length]
    command += ["--cells", *cells, "--methods", *methods]
    try:
        output = step.command(*command, cwd=folder, env=environment)
        step.found["figures"] = last_json(output)
    finally:
        keep_training(place, step, folder)


def keep_training(place: Place, step: Step, folder: Path) -> None:
    """Keep the lines of the table; and checkpoints, models, curves and logs in one archive."""
    lines = folder / "results" / "table2.jsonl"
    if lines.is_file():
        signed = [place.signed(json.loads(line)) for line in lines.read_text().splitlines()]
        written = "".join(json.dumps(line) + "\n" for line in signed)
        place.output("table2.jsonl").write_text(written)
    kept = place.output("train.tar.gz")
    with tarfile.open(kept, "w:gz") as archive:
        for name in ("results", "runs"):
            if (folder / name).is_dir():
                archive.add(folder / name, name)
    if kept.stat().st_size > LARGEST:
        step.failures[kept.name] = f"{kept.stat().st_size} bytes: train fewer cells at once"


def stages(place: Place, *, train_with: dict[str, object]) -> list[Stage]:
    """All stages, most valuable first."""
    cells, methods = train_with["cells"], train_with["methods"]
    each = 60 * train_with["minutes"] + 45  # for starting and evaluation
    total = each * len(cells) * len(methods)

    def stage(name: str, run: Callable[..., None], need: float, limit: float) -> Stage:
        slack = 5 if place.rehearse else 1  # limits are for a machine with a GPU
        return Stage(name, partial(run, place), need, slack * limit)

    return [
        stage("info", info, 5, 60),
        stage("build", build, 15, 240),
        stage("smoke", smoke, 20, 90),
        stage("tests", tests, 60, 240),
        stage("bench", bench, 40, 300),
        stage("sanitize", sanitize, 20, 240),
        stage("train", partial(train, **train_with), min(each, total), max(total, 120)),
    ]
