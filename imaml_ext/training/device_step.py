"""A meta-step that runs entirely on the device: sampling, meta-gradient, acceptance, update.

The host reads no tensor, so it can run ahead, and the step can be recorded.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data.tasks import RecordableSource, TaskBatch, TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.training.capture import Capture, no_capture
from imaml_ext.training.distributed import Group, with_some_weight
from imaml_ext.training.evaluation import Metric
from imaml_ext.training.record import measure
from imaml_ext.training.snapshot import Snapshot

_MAX_RECORDINGS = 8  # per training; settings that change more often are not worth recording


def why_not_on_device(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the optimizer's step needs the host, with the remedy; None if it does not."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if "capturable" in group:
            if not group["capturable"]:
                return f"create {name} with capturable=True"
        elif not isinstance(optimizer, torch.optim.SGD):
            return f"{name} is not capturable"
        elif not group["fused"]:
            return f"create {name} with fused=True"
    return None


class DeviceStep:
    """One meta-step of `method` on a batch of `source`, applied unless it is refused.

    A step whose tasks all fail is not applied. With `nonfinite="propagate"` a step with any failed
    task is refused, and every step after it, until `clear_refused`. Parameters and optimizer state
    then keep their values. The state must exist: the optimizer must have made a step before.

    Args:
        optimizer: accepted by `why_not_on_device`. Its learning rates may change between steps.
        names: the names of a record's entries.
        rows: number of latest steps whose records are kept.
        capture: how to record the step. If recording fails, steps run unrecorded, with a warning.
        group: the processes that share the tasks; `source` samples the shard of this process.
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
        zeros = partial(torch.zeros, device=method.layout.device)
        self._step_number = zeros((), dtype=torch.int64)
        self._refused = zeros((), dtype=torch.bool)
        self._rates = [zeros((), dtype=torch.float32) for _ in optimizer.param_groups]
        self._records = zeros((rows, len(names)), dtype=torch.float64)
        self._batch: TaskBatch | None = None  # of a source that is not recordable
        self._next = 0  # the host's copy of _step_number
        self._capture = capture
        self._recordings = 0
        self._recorded_objects: list[Any] = []
        self._replay: Callable[[], None] | None = None

    def matches(
        self,
        method: Method,
        source: TaskSource,
        optimizer: torch.optim.Optimizer,
        metrics: dict[str, Metric],
    ) -> bool:
        """Whether these are the objects that this step was built from."""
        same = method is self.method and source is self.source and optimizer is self.optimizer
        return same and metrics == self.metrics

    def run(self, step: int) -> None:
        """Make the meta-step of this number. Only recording synchronises."""
        with torch.cuda.device_of(self._step_number):
            if step != self._next:
                self._step_number.fill_(step)
            for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
            if not isinstance(self.source, RecordableSource):
                self._copy_batch(TaskBatch.of(self.source.sample(step)))
            if self._capture is not no_capture and self._must_record():
                self._record()
            (self._replay or self._step)()
        self._next = step + 1

    def read(self, steps: range) -> list[dict[str, float]]:
        """The records of these steps, which must be the latest. Waits for the device."""
        table = self._records.tolist()
        return [dict(zip(self.names, table[n % self.rows], strict=True)) for n in steps]

    def clear_refused(self) -> None:
        """Apply steps again after a refusal."""
        self._refused.zero_()

    def _step(self) -> None:
        batch = self._batch
        if isinstance(self.source, RecordableSource):
            batch = TaskBatch.of(self.source.sample(self._step_number))
        assert batch is not None
        self.method.at_step(self._step_number)
        own = batch if self._group is None else with_some_weight(batch)
        out = self.method.meta_gradient(own)
        gradients, entries = measure(self.method, out, batch, self.metrics, self._group)
        with torch.no_grad():
            record = torch.stack([entries[name] for name in self.names])
            row = self._step_number % self.rows
            self._records.index_copy_(0, row[None], record[None])
            failed = entries["failed"]
            if self.method.nonfinite == "propagate":
                self._refused.logical_or_(failed > 0)
            applied = (failed < 1) & ~self._refused
            for name, tensor in self.method.learned().items():
                tensor.grad = gradients[name]
            before = Snapshot(self._updated())
            self._update()
            before.restore(unless=applied)
            self._step_number.add_(1)

    def _warm_up(self) -> None:
        """Run the step, and restore everything that it writes."""
        learned = self.method.learned().values()
        gradients = [tensor.grad for tensor in learned]
        own = [self._records, self._refused, self._step_number]
        before = Snapshot([*self._updated(), *self.method.buffers().values(), *own])
        try:
            self._step()
        finally:
            before.restore()
            for tensor, gradient in zip(learned, gradients, strict=True):
                tensor.grad = gradient

    def _update(self) -> None:
        """The optimizer's step, with learning rates that are read on the device."""
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
        """The tensors that the optimizer writes: its parameters and its state."""
        groups, states = self.optimizer.param_groups, self.optimizer.state.values()
        return [
            *(tensor for group in groups for tensor in group["params"]),
            *(value for state in states for value in state.values() if isinstance(value, Tensor)),
        ]

    def _copy_batch(self, batch: TaskBatch) -> None:
        if self._batch is None:
            self._batch = batch.clone()
            return
        try:
            self._batch.copy_(batch)
        except ValueError as error:
            self._stop_recording(str(error))
            self._batch = batch

    def _must_record(self) -> bool:
        """Whether any object that a recording refers to was replaced since the last one."""
        now = [*self._updated(), *self.method.learned().values(), *vars(self.method).values()]
        if isinstance(self.source, RecordableSource):
            now += vars(self.source).values()
        for group in self.optimizer.param_groups:
            now += (value for name, value in group.items() if name not in ("params", "lr"))
        recorded, self._recorded_objects = self._recorded_objects, now
        return [*map(id, recorded)] != [*map(id, now)]

    def _record(self) -> None:
        self._recordings += 1
        if self._recordings > _MAX_RECORDINGS:
            self._stop_recording(
                "settings change too often, such as betas that a scheduler sets; only the learning "
                "rate may change in every step"
            )
            return
        self._replay = None  # frees the memory of the last recording
        try:
            self._replay = self._capture(self._step, self._warm_up)
        except RuntimeError as error:
            self._stop_recording(str(error))

    def _stop_recording(self, reason: str) -> None:
        for tensor in self.method.learned().values():
            tensor.grad = None
        self._replay, self._capture = None, no_capture
        warnings.warn(f"meta-steps are not recorded: {reason.splitlines()[0]}", stacklevel=5)
