"""What does each part of a meta-step cost, if only a head is adapted?

Tasks of Omniglot's size, a body of four convolutions, and a head that is adapted by one Newton
step. "On features": the body computes features once, with batch norm's running statistics outside
of the inner problem, and `adapt` solves ridge regression on them. "ANIL": the body is inside the
loss, `implicit_meta_grad(shared=body)`, so that each evaluation of the loss includes its forward
pass.

Parts are timed within whole meta-steps. The share of the arithmetic is that of the multiply-adds
in convolutions and matrix products: the share of the time, if these ran at one rate, and nothing
else took time. Every part handles all tasks at once: with more tasks, the head's time per task
falls, and the body's stays the same. On Linux that needs MALLOC_MMAP_THRESHOLD_=4000000000 and
MALLOC_TRIM_THRESHOLD_=8000000000 in the environment: otherwise glibc returns each activation above
32 MB to the system, and the page faults take as long as the arithmetic.
"""

import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from harness import parser, provenance, report, synchronize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imaml_ext import ConjugateGradient, HessianFree, adapt, implicit_meta_grad, module_loss
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.linear.base import LinearSystem
from imaml_ext.solvers.solution import Solution

LAM = 0.3
Measured = dict[str, float]  # by part


class Meter:
    """Seconds, or multiply-adds, of each part; those of a part within a part count only there."""

    def __init__(self, device: torch.device, *, counts: bool = False) -> None:
        self.device, self.counts = device, counts
        self.spent: Measured = {}
        self._within = 0.0  # spent so far in the parts of the current level

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer, self._within = self._within, 0.0
        counter = FlopCounterMode(display=False)
        synchronize(self.device)
        start = time.perf_counter()
        with counter if self.counts else nullcontext():
            yield
        synchronize(self.device)
        total = time.perf_counter() - start
        if self.counts:
            total = counter.get_total_flops() / 2
        self.spent[name] = self.spent.get(name, 0.0) + total - self._within
        self._within = outer + total


@dataclass(frozen=True)
class MeteredNewton(HessianFree):
    """One Newton step on every task, as the part `head: inner solve`."""

    meter: Any = None

    def solve(self, problem: Proximal) -> Solution:
        with self.meter.part("head: inner solve"):
            return super().solve(problem)


@dataclass(frozen=True)
class MeteredCG(ConjugateGradient):
    """Conjugate gradient, as the part `head: linear solve`."""

    meter: Any = None

    def _solve(self, system: LinearSystem) -> Solution:
        with self.meter.part("head: linear solve"):
            return super()._solve(system)


def ridge(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - nn.functional.one_hot(y, z.shape[-1])).square().sum()


class Network(nn.Module):
    """Four blocks of convolution, batch norm and ReLU, then the head."""

    def __init__(self, way: int, width: int, meter: Meter, *, running: bool) -> None:
        super().__init__()
        self.meter = meter
        layers: list[nn.Module] = []
        for fan_in in (1, width, width, width):
            layers += [
                nn.Conv2d(fan_in, width, 3, stride=2, padding=1),
                nn.BatchNorm2d(width, track_running_stats=running),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(4 * width, way)

    def features(self, x: Tensor) -> Tensor:
        with self.meter.part("body: forward"):
            return self.body(x) / self.head.in_features**0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class MetaStep(ABC):
    """A meta-step on the same B tasks each time; a subclass has the meta-gradient."""

    running = True

    def __init__(self, tasks: int, chosen: Any, *, counts: bool = False) -> None:
        torch.manual_seed(0)
        device = torch.device(chosen.device)
        self.meter = Meter(device, counts=counts)
        self.network = Network(chosen.way, chosen.width, self.meter, running=self.running)
        self.network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.linear = MeteredCG(max_iter=40, rtol=1e-3, meter=self.meter)
        cg = ConjugateGradient(max_iter=40, rtol=1e-4)
        self.inner = MeteredNewton(steps=1, linear=cg, damping=0.0, meter=self.meter)
        labels = torch.arange(chosen.way, device=device).expand(tasks, -1)

        def examples(count: int) -> tuple[Tensor, Tensor]:
            images = torch.rand(tasks, chosen.way * count, 1, 28, 28, device=device)
            return images, labels.repeat_interleave(count, dim=1)

        self.support, self.query = examples(1), examples(chosen.query)

    def __call__(self) -> Measured:
        """What each part spent."""
        self.meter.spent.clear()
        self.optimizer.zero_grad()
        self.meta_gradient()
        with self.meter.part("optimizer"):
            self.optimizer.step()
        return dict(self.meter.spent)

    @abstractmethod
    def meta_gradient(self) -> None:
        """Fill the gradients, while the meter measures the parts."""


class OnFeatures(MetaStep):
    """`adapt` with the body's features as data."""

    def meta_gradient(self) -> None:
        (x, y), (query_x, query_y) = self.support, self.query
        images = torch.cat([x, query_x], 1)
        features = self.network.features(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        leaf = features.detach().requires_grad_()
        with self.meter.part("head: query loss, pull-back"):
            shots = y.shape[1]
            params = dict(self.network.head.named_parameters())
            head = adapt(
                self.loss, params, (leaf[:, :shots], y),
                lam=LAM, inner=self.inner, linear=self.linear,
            )  # fmt: skip
            losses = torch.func.vmap(self.loss)(head, (leaf[:, shots:], query_y))
            losses.mean().backward()
        with self.meter.part("body: backward"):
            features.backward(leaf.grad)

    @staticmethod
    def loss(params: Any, data: Any) -> Tensor:
        features, y = data
        return ridge(nn.functional.linear(features, params["weight"], params["bias"]), y)


class Anil(MetaStep):
    """`implicit_meta_grad(shared=body)`."""

    running = False  # a task's statistics, as in ANIL

    def meta_gradient(self) -> None:
        named = dict(self.network.named_parameters())
        body = {name: named[name] for name in named if name.startswith("body")}
        head = {name: named[name] for name in named if name.startswith("head")}
        with self.meter.part("head: query loss, pull-back; body: backward"):
            out = implicit_meta_grad(
                module_loss(self.network, ridge), head, self.support, self.query,
                lam=LAM, inner=self.inner, linear=self.linear, shared=body,
            )  # fmt: skip
        for name, gradient in (out.params | out.shared).items():
            named[name].grad = gradient


METHODS: dict[str, Callable[..., MetaStep]] = {"head on features": OnFeatures, "ANIL": Anil}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--way", type=int, default=20)
    options.add_argument("--query", type=int, default=5)
    options.add_argument("--width", type=int, default=64, help="filters of each convolution")
    options.add_argument("--tasks", type=int, nargs="+", default=[4, 16])
    chosen = options.parse_args()
    settings = {key: getattr(chosen, key) for key in ("way", "query", "width", "tasks")}
    settings["mmap_threshold"] = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    results = provenance("heads", torch.device(chosen.device), settings)
    results["methods"] = {}
    for name, method in METHODS.items():
        steps = {tasks: method(tasks, chosen) for tasks in chosen.tasks}
        samples: dict[int, list[Measured]] = {tasks: [] for tasks in steps}
        for number in range(-2, chosen.rounds):
            for tasks, step in steps.items():
                measured = step()
                if number >= 0:
                    samples[tasks].append(measured)
        counted = {tasks: method(tasks, chosen, counts=True)() for tasks in chosen.tasks}
        rows = {
            part: {
                "seconds": [statistics.median(s[part] for s in samples[t]) for t in chosen.tasks],
                "multiply_adds": [counted[t][part] for t in chosen.tasks],
            }
            for part in counted[chosen.tasks[0]]
        }
        results["methods"][name] = rows
        print(name)
        for part, row in rows.items():
            times = ", ".join(f"{1e3 * seconds:.1f}" for seconds in row["seconds"])
            print(f"  {part}: {times} ms, {row['multiply_adds'][0] / 1e6:.1f} M multiply-adds")
    report(results, chosen.json)


if __name__ == "__main__":
    main()
