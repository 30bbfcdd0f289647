"""Figure 2a: how fast do the meta-gradients of MAML and iMAML approach the exact one?

The tasks are linear regressions on Fourier features, for which the exact meta-gradient has a closed
form. For iMAML, the a-posteriori error estimates of phi and x (delta and delta' of the paper's
Algorithm 2) are compared with the true errors.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch
from imaml_ext.experiments.plots import label, panels, save
from imaml_ext.experiments.reproduce.study import Record, Settings, Study
from imaml_ext.methods.implicit import implicit_meta_grad
from imaml_ext.methods.maml import MAML
from imaml_ext.solvers.inner import GradientDescent
from imaml_ext.solvers.linear.cg import ConjugateGradient

TASKS, POINTS, FREQUENCIES, LAM = 8, 20, 3, 0.003
CG_STEPS = (2, 5, 10)
SHOWN = 5  # CG steps of the curves whose error estimates are drawn
BUDGETS = [*range(1, 101), *(round(10 ** (k / 10)) for k in range(21, 36))]

Data = tuple[Tensor, Tensor]


def loss(params: dict[str, Tensor], data: Data) -> Tensor:
    features, y = data
    return 0.5 * ((features @ params["w"] - y) ** 2).mean()


def make_tasks(seed: int, device: torch.device) -> tuple[Tensor, TaskBatch]:
    """theta, and tasks `y = w·features(x) + noise` with amplitudes 1 / frequency²; float64."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.arange(1, FREQUENCIES + 1, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    true = normal(TASKS, 2 * FREQUENCIES, 1)

    def draw() -> Data:
        x = torch.rand(TASKS, POINTS, 1, generator=generator, dtype=torch.float64)
        angle = math.pi * (2 * x - 1) * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1) / frequency.repeat(2) ** 2
        y = (features @ true)[..., 0] + 0.1 * normal(TASKS, POINTS)
        return features.to(device), y.to(device)

    return normal(2 * FREQUENCIES).to(device), TaskBatch(draw(), draw())


def normal_equations(data: Data) -> tuple[Tensor, Tensor]:
    """Hessian [B, D, D] and negative gradient at 0 [B, D] of each task's loss."""
    features, y = data
    points = features.shape[1]
    return features.mT @ features / points, (features.mT @ y[..., None])[..., 0] / points


def measure(settings: Settings) -> Iterator[Record]:
    theta, batch = make_tasks(settings.seed, settings.device)
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    hessian, linear = normal_equations(batch.support)
    system = hessian + LAM * eye
    best = torch.linalg.solve(system, linear + LAM * theta)
    query_hessian, query_linear = normal_equations(batch.query)

    def query_gradient(phi: Tensor) -> Tensor:
        return (query_hessian @ phi[..., None])[..., 0] - query_linear

    exact = LAM * torch.linalg.solve(system, query_gradient(best)).mean(0)
    spectrum = torch.linalg.eigvalsh(system)
    lr = 1 / spectrum.max().item()
    shared = {
        "inner_steps": BUDGETS,
        "kappa": (spectrum[:, -1] / spectrum[:, 0]).mean().item(),
        "tasks": TASKS,
        "lam": LAM,
        "lr": lr,
        "seed": settings.seed,
    }
    params = {"w": theta.clone().requires_grad_()}

    def relative(gradient: Tensor) -> float:
        error: float = ((gradient - exact).norm() / exact.norm()).item()
        return error

    errors = []
    for steps in BUDGETS:
        method = MAML(loss, params, inner=GradientDescent(lr, steps), lam=LAM)
        errors.append(relative(method.meta_gradient(batch).params["w"]))
    yield {"method": "maml", "error": errors, **shared}
    for cg_steps in CG_STEPS:
        curves: dict[str, list[float]] = {
            name: [] for name in ("error", "phi_error", "phi_bound", "x_error", "x_bound")
        }
        for steps in BUDGETS:
            out = implicit_meta_grad(
                loss, params, batch.support, batch.query, lam=LAM,
                inner=GradientDescent(lr, steps), linear=ConjugateGradient(cg_steps),
            )  # fmt: skip
            x = torch.linalg.solve(system, query_gradient(out.inner.value))
            curves["error"].append(relative(out.params["w"]))
            for name, values in {
                "phi_error": (out.inner.value - best).norm(dim=1),
                "phi_bound": out.inner.error_estimate,
                "x_error": (out.linear.value - x).norm(dim=1),
                "x_bound": out.linear.error_estimate,
            }.items():
                curves[name].append(values.mean().item())
        yield {"method": "imaml", "cg_steps": cg_steps, **curves, **shared}


def draw(records: list[Record], folder: Path) -> list[Path]:
    figure, (left, right) = panels(2)
    for record in records:
        maml = record["method"] == "maml"
        name = "MAML" if maml else f"iMAML, {record['cg_steps']} CG steps"
        left.loglog(record["inner_steps"], record["error"], "k--" if maml else "-", label=name)
    left.axvline(100, color="grey", lw=0.8, ls=":")
    shown = next(record for record in records if record.get("cg_steps") == SHOWN)
    for name, color in (("phi", "C0"), ("x", "C1")):
        for what, line, text in (("error", "-", "true error"), ("bound", "--", "estimate")):
            y = shown[f"{name}_{what}"]
            right.loglog(shown["inner_steps"], y, line, color=color, label=f"{name}: {text}")
    steps = "inner gradient steps"
    tasks = f"kappa = {shown['kappa']:.0f}, {shown['tasks']} tasks"
    label(left, steps, "relative error of the meta-gradient", tasks)
    label(right, steps, "distance, mean over tasks", f"error estimates, {SHOWN} CG steps")
    return [save(figure, folder / "fig2a.png")]


def summary(records: list[Record]) -> Record:
    """Errors at 100 steps and at the end, and the range of each estimate over its true error."""
    figures: Record = {}
    for record in records:
        name = "maml" if record["method"] == "maml" else f"imaml, {record['cg_steps']} CG steps"
        at = record["inner_steps"].index(100)
        error = record["error"]
        figures[name] = {"error at 100 steps": error[at], "at the end": error[-1]}
        for what in ("phi", "x"):
            if f"{what}_bound" in record:
                pairs = zip(record[f"{what}_bound"], record[f"{what}_error"], strict=True)
                ratios = [bound / error for bound, error in pairs if error > 1e-12]
                if ratios:
                    figures[name][f"estimate / error of {what}"] = [min(ratios), max(ratios)]
    return figures


STUDY = Study("how fast does the meta-gradient approach the exact one?", measure, draw, summary)
