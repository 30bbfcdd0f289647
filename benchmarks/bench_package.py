"""How long does importing and installing the package take, and how large is it?

Imports are timed in turn, each in a new process: wall time, and CPU time (user and system). On a
busy machine, the times of two processes differ by more than the package adds, so the added fraction
of CPU time is also measured within one process. To measure archives, build them first:

    IMAML_CUDA=off pip wheel --no-deps -w dist/cpu .
    python benchmarks/bench_package.py --archive "wheel=$(echo dist/cpu/*.whl)"
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Timing, parser, provenance, report, time_in_turn

CPU = torch.device("cpu")
STATEMENTS = ("import torch", "import torch, imaml_ext")
HERE = Path(__file__).parent  # a folder from which the sources cannot be imported


def run(*command: str) -> float:
    """User and system seconds of a process and its children."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=HERE)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return used.ru_utime + used.ru_stime


def time_processes(commands: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Seconds of each command, in turn: {name: {"wall": ..., "cpu": ...}}."""
    cpu: dict[str, list[float]] = {name: [] for name in commands}

    def timed(name: str) -> Callable[[], None]:
        return lambda: cpu[name].append(commands[name]())

    calls = {name: timed(name) for name in commands}
    wall = time_in_turn(calls, lambda: None, CPU, rounds, warm_up=1)
    return {
        name: {"wall": wall[name], "cpu": summary(samples[-rounds:])}
        for name, samples in cpu.items()
    }


WITHIN = """
from time import process_time
start = process_time()
import torch
middle = process_time()
import imaml_ext
print((process_time() - middle) / (middle - start))
"""


def added_within(rounds: int) -> Timing:
    """CPU time of importing imaml_ext, relative to importing torch just before."""
    return summary(
        [
            float(subprocess.check_output([sys.executable, "-c", WITHIN], text=True, cwd=HERE))
            for _ in range(rounds)
        ]
    )


def summary(samples: list[float]) -> Timing:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def time_imports(rounds: int) -> dict[str, Any]:
    return time_processes(
        {code: lambda code=code: run(sys.executable, "-c", code) for code in STATEMENTS}, rounds
    )


def time_install(wheel: Path, rounds: int) -> Timing:
    """Wall time of installing a wheel into a new folder, without dependencies."""

    def install() -> float:
        with tempfile.TemporaryDirectory() as target:
            options = ["--no-deps", "--no-index", "--quiet", "--target", target]
            return run(sys.executable, "-m", "pip", "install", *options, str(wheel))

    return time_processes({"install": install}, rounds)["install"]["wall"]


def measure_archive(path: Path, rounds: int) -> dict[str, Any]:
    """The size of an archive; for a wheel also the installed size and the installation time."""
    measured: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
        measured |= {
            "files": len(sizes),
            "installed_bytes": sum(sizes),
            "install": time_install(path, rounds),
        }
    return measured


def archive(text: str) -> tuple[str, Path]:
    label, _, path = text.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected LABEL=FILE, got {text!r}")
    return label, Path(path).resolve()  # it is used from another working directory


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--archive", type=archive, nargs="*", default=[], metavar="LABEL=FILE",
        help="wheels and sdists to measure",
    )  # fmt: skip
    options.add_argument("--installs", type=int, default=5, help="installations of each wheel")
    chosen = options.parse_args()
    imports = time_imports(chosen.rounds)
    plain, both = (imports[code] for code in STATEMENTS)
    for code, took in imports.items():
        print(f"{code:24s} {took['wall']['median']:.3f} s, CPU {took['cpu']['median']:.3f} s")
    added = {clock: both[clock]["median"] / plain[clock]["median"] - 1 for clock in both}
    within = added_within(chosen.rounds)
    print(
        f"added: {100 * added['wall']:.1f}% of wall time, {100 * added['cpu']:.1f}% of CPU time, "
        f"within a process {100 * within['median']:.1f}%"
    )
    archives = {}
    for label, path in chosen.archive:
        archives[label] = measure_archive(path, chosen.installs)
        print(f"{label:24s} {archives[label]['bytes'] / 1e6:.2f} MB")
    results = {"imports": imports, "added": added, "added_within": within, "archives": archives}
    settings = {"rounds": chosen.rounds, "installs": chosen.installs}
    report({**provenance("package", CPU, settings), **results}, chosen.json)


if __name__ == "__main__":
    main()
