"""How do time and kernel launches scale with tasks, parameters and steps?

Measures the time of a meta-gradient as a function of the number of tasks B, the width of the
network (and so D), the inner steps and the CG steps, and the time of the vector work of conjugate
gradient as a function of B and D. Fits a power law to sizes and a line to steps. The launches per
CG iteration must be constant. They are the difference between two solves whose numbers of
iterations differ by one: on the CPU the calls of `imaml::` operators, on CUDA the kernels that run,
including those of the product.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_cg import Fused, Systems
from harness import parser, provenance, report, time_in_turn
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch_meta_gradient import check_work, library
from workload import WORKLOADS, make_workload

from imaml_ext import conjugate_gradient
from imaml_ext.experiments.plots import save

Series = list[tuple[float, float]]  # (size, seconds)
STEPS = ("inner steps", "CG steps")


def meta_gradient_series(chosen: Any, device: torch.device) -> dict[str, Series]:
    """Seconds of a meta-gradient; one size is varied at a time."""
    base = {"tasks": 4, "width": chosen.widths[0], "inner_steps": 4, "cg_steps": 2}
    varied = {
        "tasks B": ("tasks", chosen.tasks),
        "parameters D": ("width", chosen.widths),
        "inner steps": ("inner_steps", chosen.steps),
        "CG steps": ("cg_steps", chosen.steps),
    }
    series: dict[str, Series] = {}
    for label, (name, values) in varied.items():
        sizes, calls = [], {}
        for value in values:
            workload = make_workload(
                chosen.workload, device, torch.float32, **(base | {name: value})
            )
            check_work(workload)
            sizes.append(workload.layout.dim if name == "width" else value)
            calls[str(value)] = library(workload)
        timings = time_in_turn(calls, lambda: None, device, chosen.rounds)
        medians = [timing["median"] for timing in timings.values()]
        series[label] = list(zip(sizes, medians, strict=True))
    return series


def vector_series(chosen: Any, device: torch.device) -> dict[str, Series]:
    """Seconds of the vector work of five CG iterations."""
    like = torch.empty((), device=device)
    shapes = {
        "tasks B, vector work": [(tasks, chosen.dims[0]) for tasks in chosen.tasks],
        "parameters D, vector work": [(chosen.tasks[0], dim) for dim in chosen.dims],
    }
    series: dict[str, Series] = {}
    for label, pairs in shapes.items():
        solves = {str(pair): Fused(Systems.make(*pair, 5, like)) for pair in pairs}

        def prepare(solves: dict[str, Fused] = solves) -> None:
            for solve in solves.values():
                solve.prepare()

        timings = time_in_turn(dict(solves), prepare, device, chosen.rounds)
        sizes = [pair[label.startswith("parameters")] for pair in pairs]
        medians = [timing["median"] for timing in timings.values()]
        series[label] = list(zip(sizes, medians, strict=True))
    return series


def fit(label: str, series: Series) -> dict[str, float]:
    """Least-squares fit: seconds = c size^power, or start + each * steps."""
    sizes, times = zip(*series, strict=True)
    if label in STEPS:
        each, start = statistics.linear_regression(sizes, times)
        return {"start": start, "each": each}
    power, _ = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(time) for time in times]
    )
    return {"power": power}


def launches(tasks: int, dim: int, iterations: int, device: torch.device) -> int:
    b = torch.randn(tasks, dim, device=device)
    h = 1 + torch.rand(tasks, dim, device=device)

    def solve() -> None:
        conjugate_gradient(lambda p: h * p, b, lam=2.0, max_iter=iterations)

    solve()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        solve()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        return sum(event.device_type == DeviceType.CUDA for event in recorded.events())
    return sum(event.name.startswith("imaml::") for event in recorded.events())


def launches_per_iteration(chosen: Any, device: torch.device) -> list[dict[str, int]]:
    rows = []
    for tasks in (chosen.tasks[0], chosen.tasks[-1]):
        for dim in (chosen.dims[0], chosen.dims[-1]):
            for before in (1, 4):
                more = launches(tasks, dim, before + 1, device)
                more -= launches(tasks, dim, before, device)
                rows.append({"tasks": tasks, "dim": dim, "iteration": before + 1, "launches": more})
    return rows


def draw(series: dict[str, Series], fits: dict[str, dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(14, 7.5))
    for axis, (label, points) in zip(figure.subplots(2, 3).flat, series.items(), strict=True):
        sizes, times = zip(*points, strict=True)
        axis.plot(sizes, [1e3 * time for time in times], "o-")
        axis.set_xlabel(label)
        axis.set_ylabel("ms")
        axis.set_title(describe(fits[label]))
        if label not in STEPS:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def describe(fitted: dict[str, float]) -> str:
    if "power" in fitted:
        return f"time ~ size^{fitted['power']:.2f}"
    return f"{1e3 * fitted['start']:.1f} ms + {1e3 * fitted['each']:.2f} ms per step"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--workload", choices=WORKLOADS, default="omniglot-5w1s")
    options.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    options.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    options.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    options.add_argument("--dims", type=int, nargs="+", default=[2**k for k in range(12, 20)])
    options.add_argument("--png", type=Path, help="write a plot of the curves")
    chosen = options.parse_args()
    device = torch.device(chosen.device)

    series = meta_gradient_series(chosen, device) | vector_series(chosen, device)
    fits = {label: fit(label, points) for label, points in series.items()}
    counted = launches_per_iteration(chosen, device)
    for label, fitted in fits.items():
        points = ", ".join(f"{size:g}: {1e3 * time:.2f}" for size, time in series[label])
        print(f"{label:26s} {describe(fitted):28s} ms: {points}")
    numbers = sorted({row["launches"] for row in counted})
    print(f"launches per CG iteration: {numbers}")
    if len(numbers) > 1:
        raise SystemExit(f"the launches per CG iteration are not constant: {counted}")
    if chosen.png is not None:
        draw(series, fits, chosen.png)
        print(f"wrote {chosen.png}")
    settings = {"workload": chosen.workload, "picture": chosen.png and chosen.png.name}
    report(
        {**provenance("scaling", device, settings), "series": series, "fits": fits,
         "launches_per_iteration": numbers[0]},
        chosen.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
