"""Plots of a training, and helpers for all plots."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from imaml_ext._io import write_atomically
from imaml_ext.experiments.build import Experiment
from imaml_ext.training.trainer import Trainer


def panels(count: int, *, width: float = 5.5, sharey: bool = False) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure  # on first use: it loads slowly

    figure = Figure(figsize=(width * count, 4.2))
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def label(axis: Any, x: str, y: str = "", title: str = "", **legend: Any) -> None:
    """Add the names of the axes, a title, a grid and a legend."""
    axis.set(xlabel=x, ylabel=y, title=title)
    axis.grid(alpha=0.3)
    axis.legend(**legend)


def save(figure: Any, path: Path) -> Path:
    """Write the figure as PNG."""
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


def of_training(experiment: Experiment, trainer: Trainer, folder: Path) -> list[Path]:
    """Plot the learning curves and, for sinusoids, the model's fits. Returns the files."""
    curves = folder / "learning_curves.png"
    written = [learning_curves(trainer.history, trainer.validation, curves)]
    if experiment.config.dataset == "sinusoid":
        written.append(sinusoid_fits(experiment, folder / "fits.png"))
    return written


def learning_curves(
    history: list[dict[str, float]], validation: list[dict[str, float]], path: Path
) -> Path:
    """Plot training (running mean) and validation against meta-steps, one panel per metric."""
    names = [name for name in ("accuracy", "loss") if name in history[0]]
    figure, axes = panels(len(names))
    step = np.array([record["step"] for record in history])
    window = max(1, len(history) // 50)
    for axis, name in zip(axes, names, strict=True):
        scale = 100 if name == "accuracy" else 1
        values = scale * np.array([record[name] for record in history])
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(step[window - 1 :], mean, label=f"training, query set, mean of {window} steps")
        validated = [scale * record[name] for record in validation]
        axis.plot(
            [record["step"] for record in validation], validated, "o-",
            label="validation, unseen tasks",
        )  # fmt: skip
        label(axis, "meta-step", "accuracy (%)" if name == "accuracy" else "query loss")
        if name == "loss":
            axis.set_yscale("log")
    return save(figure, path)


def sinusoid_fits(experiment: Experiment, path: Path) -> Path:
    """Plot up to four tasks: the data, and the model before and after adaptation."""
    method, loss, batch = experiment.method, experiment.loss, experiment.sources["test"].sample(0)
    phi = method.adapt(batch.support)
    example = next(iter(method.params.values()))
    grid = torch.linspace(-5, 5, 200, dtype=example.dtype, device=example.device)[:, None]
    figure, axes = panels(min(4, len(batch.query[0])), width=4, sharey=True)
    with torch.no_grad():
        start = loss.outputs(method.params, grid).cpu()
        for task, axis in enumerate(axes):
            row = {name: tensor[task] for name, tensor in phi.items()}
            fit = loss.outputs(row, grid).cpu()
            x, y = (tensor[task, :, 0].cpu() for tensor in batch.query)
            order = x.argsort()
            axis.plot(x[order], y[order], label="true function")
            axis.plot(grid.cpu(), start, ":", label="before adaptation")
            axis.plot(grid.cpu(), fit, "--", label="after adaptation")
            axis.plot(*(t[task, :, 0].cpu() for t in batch.support), "k^", label="support set")
            axis.set_xlabel("x")
    axes[0].set_ylabel("y")
    axes[0].legend()
    return save(figure, path)
