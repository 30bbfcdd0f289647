"""Plots of a training, and helpers for all plots."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._io import write_atomically
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.experiments.build import Experiment
from imaml_ext.problem.layout import Params
from imaml_ext.training.trainer import Trainer


def panels(count: int, *, width: float = 5.5, sharey: bool = False) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side."""
    figure = _figure(width * count, 4.2)
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # on first use: it loads slowly

    return Figure(figsize=(width, height))


def label(axis: Any, x: str, y: str = "", title: str = "", **legend: Any) -> None:
    """Add the names of the axes, a title, a grid and a legend."""
    axis.set(xlabel=x, ylabel=y, title=title)
    axis.grid(alpha=0.3)
    axis.legend(**legend)


def save(figure: Any, path: Path) -> Path:
    """Write the figure as PNG."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


def of_training(experiment: Experiment, trainer: Trainer, folder: Path) -> list[Path]:
    """Plot the learning curves and some test tasks. Returns the files."""
    curves = folder / "learning_curves.png"
    written = learning_curves(trainer.history, trainer.validation, curves)
    return [written, of_tasks(experiment, "test", folder)]


def of_tasks(experiment: Experiment, split: str, folder: Path) -> Path:
    """Plot the model's predictions for the first tasks of a split. Returns the file."""
    if experiment.config.dataset == "sinusoid":
        return sinusoid_fits(experiment, split, folder / "fits.png")
    return image_predictions(experiment, split, folder / "predictions.png")


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


def sinusoid_fits(experiment: Experiment, split: str, path: Path) -> Path:
    """Plot up to four tasks: the data, and the model before and after adaptation."""
    method, loss = experiment.method, experiment.loss
    batch, phi = _adapted(experiment, split, tasks=4)
    example = next(iter(method.params.values()))
    grid = torch.linspace(-5, 5, 200, dtype=example.dtype, device=example.device)[:, None]
    figure, axes = panels(len(phi), width=4, sharey=True)
    with torch.no_grad():
        start = loss.outputs(method.params, grid).cpu()
        for task, (axis, row) in enumerate(zip(axes, phi, strict=True)):
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


def image_predictions(experiment: Experiment, split: str, path: Path) -> Path:
    """Plot up to three tasks of up to ten classes: support images, and query images with the
    predicted class. A query image is classified together with the others of its task."""
    batch, phi = _adapted(experiment, split, tasks=3)
    classes = range(min(10, experiment.config.way))
    figure = _figure(1.1 * len(classes) + 0.6, 2.7 * len(phi))
    axes = figure.subplots(2 * len(phi), len(classes), squeeze=False)
    for task, row in enumerate(phi):
        (support, support_y), (query, query_y) = (
            (x[task].cpu(), y[task].cpu()) for x, y in (batch.support, batch.query)
        )
        with torch.no_grad():
            predicted = experiment.loss.outputs(row, batch.query[0][task]).argmax(-1).cpu()
        for number in classes:
            above, below = axes[2 * task : 2 * task + 2, number]
            at = (query_y == number).nonzero()[0, 0]
            right = predicted[at] == number
            _show(above, support[(support_y == number).nonzero()[0, 0]], f"{number}")
            _show(below, query[at], f"{predicted[at]}", "green" if right else "red")
        axes[2 * task, 0].set_ylabel("support: class")
        axes[2 * task + 1, 0].set_ylabel("query: predicted")
    return save(figure, path)


def _show(axis: Any, image: Tensor, title: str, color: str = "black") -> None:
    """Draw an image [channels, height, width] of any range."""
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=1e-12)
    axis.imshow(image.movedim(0, -1).squeeze(-1).numpy(), cmap="gray")
    axis.set_title(title, color=color, fontsize=10)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(color)


def _adapted(experiment: Experiment, split: str, tasks: int) -> tuple[TaskBatch, list[Params]]:
    """Up to this many tasks, and the parameters adapted to each."""
    batch = experiment.sources[split].sample(0)
    first = pytree.tree_map(lambda t: t[:tasks], (batch.support, batch.query))
    phi = experiment.method.with_shared(experiment.method.adapt(first[0]))
    count = len(next(iter(phi.values())))
    return TaskBatch(*first), [{name: t[i] for name, t in phi.items()} for i in range(count)]
