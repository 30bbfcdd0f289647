"""Pictures of a training run. Drawing computes nothing but running means and the adapted fits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from imaml_ext._io import write_atomically
from imaml_ext.data.tasks import TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.problem.module_loss import ModuleLoss


def pyplot() -> Any:
    """matplotlib, loaded when something is drawn, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    """Write the picture and forget it."""
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot().close(figure)
    return path


def learning_curves(
    history: list[dict[str, float]], validation: list[dict[str, float]], path: Path
) -> Path:
    """Training (running mean) and validation, against meta-steps; one panel a measure."""
    plt = pyplot()
    names = [name for name in ("accuracy", "loss") if name in history[0]]
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), squeeze=False)
    step = np.array([record["step"] for record in history])
    window = max(1, len(history) // 50)
    for axis, name in zip(axes[0], names, strict=True):
        scale = 100 if name == "accuracy" else 1
        values = scale * np.array([record[name] for record in history])
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(step[window - 1 :], mean, label=f"train, query, mean of {window} steps")
        axis.plot(
            [record["step"] for record in validation],
            [scale * record[name] for record in validation],
            "o-",
            label="validation, unseen tasks",
        )
        axis.set_xlabel("meta-step")
        axis.set_ylabel("accuracy (%)" if name == "accuracy" else "query loss")
        axis.grid(alpha=0.3)
        axis.legend()
        if name == "loss":
            axis.set_yscale("log")
    return save(figure, path)


def sinusoid_fits(method: Method, loss: ModuleLoss, source: TaskSource, path: Path) -> Path:
    """Up to four test tasks: the truth's points, the meta-learned start, and the adapted curves."""
    plt = pyplot()
    batch = source.sample(0)
    phi = method.adapt(batch.support)
    example = next(iter(method.params.values()))
    grid = torch.linspace(-5, 5, 200, dtype=example.dtype, device=example.device)[:, None]
    shown = min(4, len(batch.query[0]))
    figure, axes = plt.subplots(1, shown, figsize=(4 * shown, 3.5), sharey=True, squeeze=False)
    with torch.no_grad():
        start = loss.outputs(method.params, grid).cpu()
        for task, axis in enumerate(axes[0]):
            row = {name: tensor[task] for name, tensor in phi.items()}
            fit = loss.outputs(row, grid).cpu()
            x, y = (tensor[task, :, 0].cpu() for tensor in batch.query)
            order = x.argsort()
            axis.plot(x[order], y[order], label="truth")
            axis.plot(grid.cpu(), start, ":", label="before adaptation")
            axis.plot(grid.cpu(), fit, "--", label="adapted")
            axis.plot(*(t[task, :, 0].cpu() for t in batch.support), "k^", label="support")
            axis.set_xlabel("x")
    axes[0, 0].set_ylabel("y")
    axes[0, 0].legend()
    return save(figure, path)
