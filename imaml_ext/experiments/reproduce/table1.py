"""Table 1: what a meta-gradient of a given accuracy costs, against the condition number kappa.

The tasks are quadratic; the eigenvalues of their proximal objectives are evenly spaced from 1 to
kappa. Each method takes the fewest steps that bring its meta-gradient within ERROR of the exact
one. Compute is the number of gradients of the loss and Hessian-vector products: one of each for a
step that is differentiated, one product for a CG iteration. Memory is the peak of the allocations.
The paper expects:

    MAML, gradient descent      compute kappa        memory kappa
    MAML, Nesterov              compute sqrt(kappa)  memory sqrt(kappa)
    truncated back-propagation  compute kappa        memory kappa (times log 1/error, not log D)
    iMAML, Nesterov             compute sqrt(kappa)  memory 1
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch
from imaml_ext.experiments.plots import label, panels, save
from imaml_ext.experiments.reproduce.memory import peak_bytes
from imaml_ext.experiments.reproduce.study import Record, Settings, Study
from imaml_ext.methods.base import Method
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.maml import MAML, TruncatedMAML
from imaml_ext.solvers.inner import GradientDescent
from imaml_ext.solvers.linear.cg import ConjugateGradient

TASKS, DIM, LAM, ERROR = 2, 100, 0.5, 1e-3
KAPPAS = (10, 30, 100, 300)
METHODS = {  # label, and the expected exponents of kappa
    "maml": ("MAML, gradient descent", {"compute": 1.0, "memory": 1.0}),
    "maml-accelerated": ("MAML, Nesterov", {"compute": 0.5, "memory": 0.5}),
    "truncated-maml": ("truncated back-propagation", {"compute": 1.0, "memory": 1.0}),
    "imaml": ("iMAML", {"compute": 0.5, "memory": 0.0}),
}
COSTS = {  # field of a record, and its unit
    "compute": ("gradients_and_products", "gradients and Hessian-vector products"),
    "memory": ("peak_bytes", "peak bytes"),
}


class Quadratic:
    """Tasks `1/2 |R w - y|²`, where R'R + LAM I has eigenvalues from 1 to kappa."""

    def __init__(self, kappa: float, seed: int, device: torch.device) -> None:
        self.kappa = kappa
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rotation, _ = torch.linalg.qr(normal(TASKS, DIM, DIM))
        spectrum = torch.linspace(1, kappa, DIM, dtype=torch.float64) - LAM
        root = (torch.diag(spectrum.sqrt()) @ rotation.mT).to(device)
        support, query = (normal(TASKS, DIM).to(device) for _ in range(2))
        eye = torch.eye(DIM, dtype=torch.float64, device=device)
        self.theta = normal(DIM).to(device)
        self.batch = TaskBatch((root, support), (eye.expand(TASKS, -1, -1), query))
        system = root.mT @ root + LAM * eye
        best = torch.linalg.solve(system, (root.mT @ support[..., None])[..., 0] + LAM * self.theta)
        self.exact = LAM * torch.linalg.solve(system, best - query).mean(0)

    @staticmethod
    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        root, y = data
        return 0.5 * ((root @ params["w"] - y) ** 2).sum()

    def method(self, name: str, steps: int, last: int) -> Method:
        """A method with `steps` inner and CG steps; truncated MAML differentiates the `last`."""
        params, lr = {"w": self.theta.clone().requires_grad_()}, 1 / self.kappa
        descent = GradientDescent(lr=lr, steps=steps)
        # The smallest eigenvalue is known here; in general MAML(accelerated=True) can only take lam
        nesterov = GradientDescent.accelerated(lr=lr, steps=steps, strong_convexity=1.0)
        if name == "maml":
            return MAML(self.loss, params, inner=descent, lam=LAM)
        if name == "maml-accelerated":
            return MAML(self.loss, params, inner=nesterov, lam=LAM)
        if name == "truncated-maml":
            return TruncatedMAML(self.loss, params, last=last, inner=descent, lam=LAM)
        linear = ConjugateGradient(max_iter=steps)
        return IMAML(self.loss, params, inner=nesterov, lam=LAM, linear=linear)

    def error(self, name: str, steps: int, last: int) -> float:
        """The relative error of the method's meta-gradient."""
        gradient = self.method(name, steps, last).meta_gradient(self.batch).params["w"]
        error: float = ((gradient - self.exact).norm() / self.exact.norm()).item()
        return error


def fewest(error: Callable[[int], float]) -> int:
    """The smallest number of steps whose error is at most ERROR, by doubling and bisection."""
    enough = 1
    while error(enough) > ERROR:
        enough *= 2
    below = enough // 2
    while enough - below > max(1, enough // 40):
        middle = (below + enough) // 2
        if error(middle) <= ERROR:
            enough = middle
        else:
            below = middle
    return enough


def measure(settings: Settings) -> Iterator[Record]:
    for kappa in KAPPAS:
        problem = Quadratic(kappa, settings.seed, settings.device)
        for name in METHODS:
            yield {**cheapest(name, problem), "seed": settings.seed}


def cheapest(name: str, problem: Quadratic) -> Record:
    """The cost of a method with the fewest steps that reach ERROR."""
    if name == "truncated-maml":
        # A tenth more steps than MAML, because truncation adds to the error.
        steps = math.ceil(1.1 * fewest(lambda k: problem.error("maml", k, k)))
        last = fewest(lambda k: problem.error(name, steps, min(k, steps)))
    else:
        steps = last = fewest(lambda k: problem.error(name, k, k))
    method = problem.method(name, steps, last)
    return {
        "method": name,
        "kappa": problem.kappa,
        "steps": steps,
        "products": last,
        "gradients_and_products": steps + last,
        "peak_bytes": peak_bytes(lambda: method.meta_gradient(problem.batch), problem.theta.device),
        "error": problem.error(name, steps, last),
        "tasks": TASKS,
        "dim": DIM,
    }


def curve(records: list[Record], name: str, cost: str) -> list[tuple[float, float]]:
    """(kappa, cost) of a method."""
    field, _ = COSTS[cost]
    return [(record["kappa"], record[field]) for record in records if record["method"] == name]


def slope(points: list[tuple[float, float]]) -> float:
    """Slope of the least-squares line through the logarithms."""
    kappa, cost = np.log(points).T
    return float(np.polyfit(kappa, cost, deg=1)[0])


def draw(records: list[Record], folder: Path) -> list[Path]:
    figure, axes = panels(2)
    for axis, (cost, (_, unit)) in zip(axes, COSTS.items(), strict=True):
        for name, (text, expected) in METHODS.items():
            points = curve(records, name, cost)
            text += f": slope {slope(points):.2f} ({expected[cost]:g} expected)"
            axis.loglog(*zip(*points, strict=True), "o-", label=text)
        label(axis, "condition number kappa", unit, cost, fontsize=8)
    return [save(figure, folder / "table1.png")]


def summary(records: list[Record]) -> Record:
    """Exponents of kappa, fitted and expected."""
    figures: Record = {}
    for name, (_, expected) in METHODS.items():
        figures[name] = {}
        for cost in COSTS:
            figures[name][cost] = round(slope(curve(records, name, cost)), 3)
            figures[name][f"{cost} expected"] = expected[cost]
    return figures


STUDY = Study(
    "how does the cost of an accurate meta-gradient grow with kappa?", measure, draw, summary
)
