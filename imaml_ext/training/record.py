"""What is recorded of a meta-step."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import MetaGradient
from imaml_ext.problem.layout import Params
from imaml_ext.solvers.solution import Status
from imaml_ext.training.distributed import Group, average
from imaml_ext.training.evaluation import Metric, per_task


def summarise(
    method: Method, out: MetaGradient, batch: TaskBatch, metrics: dict[str, Metric]
) -> dict[str, Tensor]:
    """Means over the tasks that did not fail, and the share that did, "failed"; 0-d float64."""
    phi = method.with_shared(out.adapted)
    values = {
        "loss": out.query_loss,
        "support_loss": out.support_loss,
        **{name: per_task(m, phi, batch.query) for name, m in metrics.items()},
        "inner_residual": out.inner.residual,
    }
    if out.linear is not None:
        values["linear_residual"] = out.linear.residual
        values["negative_curvature"] = out.linear.status == Status.NEGATIVE_CURVATURE
    failed = out.failed
    means = {
        name: torch.where(failed, 0, v.double()).sum() / (~failed).sum()
        for name, v in values.items()
    }
    return means | {"failed": failed.double().mean()}


def measure(
    method: Method,
    out: MetaGradient,
    batch: TaskBatch,
    metrics: dict[str, Metric],
    group: Group | None,
) -> tuple[Params, dict[str, Tensor]]:
    """Gradients by name and a summary, of the batches of all processes of the group together."""
    summary = summarise(method, out, batch, metrics)
    if group is None:
        return out.named(), summary
    return average(out.named(), summary, len(out.query_loss), group)


class DeferredRecord(Mapping[str, float]):
    """The record of a step that may still run: looking at it waits.

    Args:
        read: fills `filled`, or `error` where the step was refused.
        begun: the trainer's seconds before the step.
        schedule, rates: the scheduler's state and the learning rates before the step.
    """

    def __init__(
        self, read: Callable[[], None], begun: float, schedule: dict[str, Any], rates: list[Any]
    ) -> None:
        self.read, self.begun, self.schedule, self.rates = read, begun, schedule, rates
        self.filled: dict[str, float] | None = None
        self.error: Exception = LookupError("forgotten when a checkpoint was loaded")

    def __getitem__(self, name: str) -> float:
        return self._looked_at()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._looked_at())

    def __len__(self) -> int:
        return len(self._looked_at())

    def __repr__(self) -> str:
        return repr(self._looked_at())

    def _looked_at(self) -> dict[str, float]:
        if self.filled is None:
            self.read()
        if self.filled is None:
            raise self.error
        return self.filled
