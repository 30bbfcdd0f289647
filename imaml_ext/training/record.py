"""The record of a meta-step: means over its tasks, available at once or later."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import MetaGradient
from imaml_ext.problem.layout import Params
from imaml_ext.solvers.solution import Status
from imaml_ext.training.distributed import Group, average
from imaml_ext.training.evaluation import Metric, per_task
from imaml_ext.training.snapshot import ScheduleSnapshot

ENTRIES = (  # of records, besides the metrics; logs add "split"
    *("split", "step", "seconds", "loss", "support_loss"),
    *("inner_residual", "linear_residual", "negative_curvature", "failed"),
)


def measure(
    method: Method,
    out: MetaGradient,
    batch: TaskBatch,
    metrics: dict[str, Metric],
    group: Group | None,
) -> tuple[Params, dict[str, Tensor]]:
    """Gradients by name, and the record as 0-d float64 tensors; averaged over the group.

    The record has means over the tasks that did not fail, and "failed", the fraction that did, both
    with the weights of the batch.
    """
    phi = method.with_shared(out.adapted)
    values = {
        "loss": out.query_loss,
        "support_loss": out.support_loss,
        **{
            name: per_task(metric, phi, batch.query, label=f"metrics[{name!r}]")
            for name, metric in metrics.items()
        },
        "inner_residual": out.inner.residual,
    }
    if out.linear is not None:
        values["linear_residual"] = out.linear.residual
        values["negative_curvature"] = out.linear.status == Status.NEGATIVE_CURVATURE
    failed = out.failed
    weights = batch.weights
    each = torch.ones_like(failed) if weights is None else weights
    used = torch.where(failed, 0.0, each.double())
    lost = torch.where(failed, each.double(), 0.0).sum()
    record = {
        name: torch.where(used > 0, value.double() * used, 0.0).sum() / used.sum()
        for name, value in values.items()
    }
    # Without any weight nothing counts, as if all had failed.
    record["failed"] = torch.where(used.sum() > 0, lost / each.double().sum(), 1.0)
    if group is None:
        return out.named(), record
    total = len(failed) if weights is None else weights.double().sum()
    return average(out.named(), record, total, group)


class DeferredRecord(Mapping[str, float]):
    """The record of a step that may still be running; accessing it waits for the device.

    Args:
        read: sets `record`, or `error` if the step was refused.
    """

    def __init__(self, read: Callable[[], None]) -> None:
        self.read = read
        self.record: dict[str, float] | None = None
        self.error: Exception = LookupError("the record was dropped when a checkpoint was loaded")

    def __getitem__(self, name: str) -> float:
        return self._wait()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._wait())

    def __len__(self) -> int:
        return len(self._wait())

    def __repr__(self) -> str:
        return repr(self._wait())

    def _wait(self) -> dict[str, float]:
        if self.record is None:
            self.read()
        if self.record is None:
            raise self.error
        return self.record


class Pending(NamedTuple):
    """A step whose record has not been read.

    Attributes:
        start: the trainer's seconds before the step.
        schedule: as before the step.
        record: the record, if it is still in use; weak, since the record refers to the trainer.
    """

    start: float
    schedule: ScheduleSnapshot
    record: ref[DeferredRecord]
