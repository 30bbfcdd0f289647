"""A meta-step as a function of tensors alone: dealing, meta-gradient, decision and update.

Nothing in it is decided on the host, so the host can run ahead, and the step be recorded.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data.tasks import RecordableSource, TaskBatch, TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.problem.layout import Params
from imaml_ext.training.capture import Capture, no_capture
from imaml_ext.training.distributed import Group
from imaml_ext.training.evaluation import Metric
from imaml_ext.training.record import measure
from imaml_ext.training.snapshot import Snapshot

_MOST_RECORDINGS = 8  # of one training; what changes more often is not worth recording


def why_not_on_device(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the optimizer's step needs the host, and what to do about it; None if it does not."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if "capturable" in group:
            if not group["capturable"]:
                return f"make {name} with capturable=True"
        elif not isinstance(optimizer, torch.optim.SGD):
            return f"{name} is not capturable"
        elif not group["fused"]:
            return f"make {name} with fused=True"
    return None


class DeviceStep:
    """One meta-step of `method` on a batch of `source`, applied unless it is to be refused.

    A step whose tasks all fail is not applied. With `nonfinite="propagate"` one with any task that
    fails is not, nor is any step after it, until `clear_refused`. Parameters and the optimizer's
    state then keep their values; the state has to be there, so the optimizer must have made a step.

    Args:
        optimizer: of which `why_not_on_device` says nothing. Its learning rates may change between
            steps.
        rows: steps whose records are kept.
        capture: how to record the step. What cannot be recorded is run as it is, with a warning.
        group: the processes that share the tasks; `source` deals this one's.

    Attributes:
        names: of a record's entries.
    """

    def __init__(
        self,
        method: Method,
        source: TaskSource,
        optimizer: torch.optim.Optimizer,
        metrics: dict[str, Metric],
        *,
        names: list[str],
        rows: int,
        capture: Capture,
        group: Group | None = None,
    ) -> None:
        self.method, self.source, self.optimizer = method, source, optimizer
        self.metrics, self.names, self.rows = dict(metrics), names, rows
        self._group = group
        self._theta = next(iter(method.params.values()))
        self._number = self._new(torch.int64)
        self._refused = self._new(torch.bool)
        self._rates = [self._new(torch.float32) for _ in optimizer.param_groups]
        self._records = self._new(torch.float64, rows, len(names))
        self._batch: TaskBatch | None = None  # what a source that is not recordable dealt
        self._next = 0  # the number that the device will find
        self._capture = capture
        self._recordings = 0
        self._recorded_of: list[Any] | None = None
        self._perform: Callable[[], None] = self._step

    def is_of(
        self,
        method: Method,
        source: TaskSource,
        optimizer: torch.optim.Optimizer,
        metrics: dict[str, Metric],
    ) -> bool:
        same = method is self.method and source is self.source and optimizer is self.optimizer
        return same and metrics == self.metrics

    def run(self, number: int) -> None:
        """Make the meta-step of this number. Nothing synchronises, but for recording it."""
        with torch.cuda.device_of(self._theta):
            if number != self._next:
                self._number.fill_(number)
            for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
            if not isinstance(self.source, RecordableSource):
                self._take(self.source.sample(number))
            if self._capture is not no_capture and self._is_new():
                self._record()
            self._perform()
        self._next = number + 1

    def read(self, numbers: range) -> list[dict[str, float]]:
        """The records of these steps, the latest of all. Waits for the device."""
        table = self._records.tolist()
        return [dict(zip(self.names, table[n % self.rows], strict=True)) for n in numbers]

    def clear_refused(self) -> None:
        """Apply steps again, after one was refused."""
        self._refused.zero_()

    def _step(self) -> None:
        gradients, record = self._measure()
        with torch.no_grad():
            row = self._number % self.rows
            self._records.index_copy_(0, row[None], record[None])
            failed = record[self.names.index("failed")]
            if self.method.nonfinite == "propagate":
                self._refused.logical_or_(failed > 0)
            applied = (failed < 1) & ~self._refused
            for name, tensor in self.method.learned().items():
                tensor.grad = gradients[name]
            before = Snapshot(self._updated())
            self._update()
            before.restore(unless=applied)
            self._number.add_(1)

    def _warm_up(self) -> None:
        """The step, after which everything that it writes is as it was."""
        learned = self.method.learned().values()
        gradients = [tensor.grad for tensor in learned]
        before = Snapshot([*self._updated(), self._records, self._refused, self._number])
        try:
            self._step()
        finally:
            before.restore()
            for tensor, gradient in zip(learned, gradients, strict=True):
                tensor.grad = gradient

    def _measure(self) -> tuple[Params, Tensor]:
        """Gradients by name, and the record."""
        if isinstance(self.source, RecordableSource):
            batch = self.source.sample(self._number)
        else:
            assert self._batch is not None
            batch = self._batch
        out = self.method.meta_gradient(batch)
        gradients, summary = measure(self.method, out, batch, self.metrics, self._group)
        return gradients, torch.stack([summary[name] for name in self.names])

    def _update(self) -> None:
        """The optimizer's step, at learning rates that are read on the device."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            self.optimizer.step()
        finally:
            for group, lr in zip(groups, rates, strict=True):
                group["lr"] = lr

    def _updated(self) -> list[Tensor]:
        """What the optimizer writes: its parameters and its state."""
        groups, states = self.optimizer.param_groups, self.optimizer.state.values()
        return [
            *(tensor for group in groups for tensor in group["params"]),
            *(value for state in states for value in state.values() if isinstance(value, Tensor)),
        ]

    def _take(self, batch: TaskBatch) -> None:
        if self._batch is None:
            self._batch = batch.clone()
            return
        try:
            self._batch.copy_(batch)
        except ValueError as error:
            self._give_up(str(error))
            self._batch = batch

    def _is_new(self) -> bool:
        """Whether anything that a recording holds fast is another object than it was then."""
        now = [*self._updated(), *self.method.learned().values(), *vars(self.method).values()]
        if isinstance(self.source, RecordableSource):
            now += vars(self.source).values()
        for group in self.optimizer.param_groups:
            now += (value for name, value in group.items() if name not in ("params", "lr"))
        then, self._recorded_of = self._recorded_of, now
        if then is None or len(then) != len(now):
            return True
        return any(a is not b for a, b in zip(then, now, strict=True))

    def _record(self) -> None:
        self._recordings += 1
        if self._recordings > _MOST_RECORDINGS:
            self._give_up("what it is made of changes again and again, as betas in a scheduler do")
            return
        self._perform = self._step  # frees the memory of a former recording
        try:
            self._perform = self._capture(self._step, self._warm_up)
        except RuntimeError as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        for tensor in self.method.learned().values():
            tensor.grad = None
        self._perform, self._capture = self._step, no_capture
        warnings.warn(
            f"meta-steps are run without recording them: {reason.splitlines()[0]}", stacklevel=5
        )

    def _new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._theta.device)
