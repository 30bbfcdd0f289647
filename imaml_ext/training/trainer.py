"""The outer loop: meta-gradients into any `torch.optim` optimizer."""

import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal
from weakref import ref

import torch

from imaml_ext._checks import check_choice, check_integer
from imaml_ext.data.tasks import LoaderSource, TaskBatch, TaskSource, as_source
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import MetaGradient
from imaml_ext.problem.programs import Programs
from imaml_ext.training import arguments, checkpoint
from imaml_ext.training.budget import Budget
from imaml_ext.training.capture import Capture, cuda_graph, no_capture
from imaml_ext.training.device_step import DeviceStep, why_not_on_device
from imaml_ext.training.distributed import (
    Group,
    broadcast_parameters,
    check_same,
    rank,
    shard,
    with_some_weight,
)
from imaml_ext.training.evaluation import Metric, check_metrics, evaluate
from imaml_ext.training.logs import Log, Record
from imaml_ext.training.optimisation import Optimisation
from imaml_ext.training.record import ENTRIES, DeferredRecord, Pending, measure
from imaml_ext.training.snapshot import ScheduleSnapshot
from imaml_ext.training.weight_averaging import averaged

Compile = Literal["auto", "on", "off"]

_EAGER_STEPS = 20  # of a training on the CPU: recording takes as long as some of them
_MOST_SCRATCH = 8 * 2**20  # bytes for a task: beyond, programs gain little


class NonfiniteError(ArithmeticError):
    """The meta-gradient of a task is not finite, so the step was refused; nothing was updated."""


class Trainer:
    """Meta-training: `optimizer` steps along the meta-gradients of the batches of `source`.

    On CUDA the whole meta-step is recorded once as a CUDA graph and replayed without
    synchronising; docs/recording.md lists what this requires of the model, the source and the
    optimizer, and what happens otherwise.

    Args:
        method: holds the learned tensors.
        source: samples a batch for each step; or an iterable of batches, such as a DataLoader or a
            list, in any form that `TaskBatch.of` accepts. It restarts when it ends; its batches are
            moved to theta's device.
        optimizer: over all tensors of `method.learned()`; default Adam with lr 1e-3. On CUDA it
            should be capturable.
        scheduler: schedule of the learning rate, stepped with the optimizer.
        metrics: reported with the loss, by name; evaluated on the query set at phi. Records have
            means over the tasks, with the weights of the batch.
        meta_gradient: replaces `method.meta_gradient`, for example with a `RecordedMetaGradient`
            of it; on the CPU only.
        compile: whether steps on the CPU replace PyTorch's operators by programs, which makes small
            networks several times faster: "on", "off", or "auto", from the 20th step on where
            the losses can be recorded; see docs/recording.md.
        capture: how to record a meta-step; default `cuda_graph` on CUDA. With `no_capture` the
            device decides whether a step is applied, without a recording. By default the host
            decides on the CPU.
        read_every: number of steps after which their records are read from the device.
        budget: updated with the steps and seconds spent; a learning-rate schedule may read it.
        log: called with "train" or "val" and each record, in order, as soon as it is available.
        process_group: a `torch.distributed` group. Its processes share the tasks of each batch,
            start from rank 0's parameters (and the other tensors of a `module_loss` model), and
            train as one process with all the tasks would; see docs/distributed.md. On CUDA their
            meta-steps are not recorded, unless a capture is given.

    Attributes:
        source: samples this process's tasks.
        programs: those of the losses; None if `compile` does not apply.
        steps: number of meta-steps made.
        seconds: time spent in `step` and `read`, over all runs of this training. Steps that are
            read together share the time equally in their records.
        history: one record per step; reading it waits for pending steps.
        validation: one record per call of `validate`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: arguments exclude each other, or the optimizer lacks a learned tensor.
    """

    def __init__(
        self,
        method: Method,
        source: TaskSource | Iterable[Any],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        metrics: dict[str, Metric] | None = None,
        meta_gradient: Callable[[TaskBatch], MetaGradient] | None = None,
        compile: Compile = "auto",
        capture: Capture | None = None,
        read_every: int = 50,
        budget: Budget | None = None,
        log: Log | None = None,
        process_group: Group | None = None,
    ) -> None:
        check_integer("read_every", read_every, minimum=1)
        arguments.check(
            method=method, metrics=metrics, meta_gradient=meta_gradient, capture=capture,
            budget=budget, log=log, process_group=process_group,
        )  # fmt: skip
        on_cuda = method.layout.device.type == "cuda"
        if meta_gradient is not None and (on_cuda or capture is not None):
            raise ValueError(
                "meta_gradient is for the CPU without a capture: otherwise whole meta-steps are "
                "recorded"
            )
        check_choice("compile", compile, ("auto", "on", "off"))
        host_only = not on_cuda and capture is None and meta_gradient is None
        if compile == "on" and not host_only:
            raise ValueError(
                "compile='on' is for the CPU, without capture and meta_gradient: on CUDA whole "
                "meta-steps are recorded"
            )
        self.compile: Compile = compile
        most = _MOST_SCRATCH if compile == "auto" else None
        self.programs = Programs(most) if host_only and compile != "off" else None
        self.method = method
        self.process_group = process_group
        self.source = shard(as_source(source, method.layout.device), process_group)
        if optimizer is None:
            learned = method.learned().values()
            optimizer = torch.optim.Adam(learned, lr=1e-3, capturable=on_cuda)
        arguments.check_optimizer(method, optimizer, scheduler)
        self.optimizer, self.scheduler = optimizer, scheduler
        if process_group is not None:
            broadcast_parameters(method, process_group)
        self.metrics = metrics or {}
        self.meta_gradient = meta_gradient
        if capture is None and on_cuda:
            capture = cuda_graph if process_group is None else no_capture
        self.capture = capture
        self.budget = Budget() if budget is None else budget
        self.log = log
        self.read_every = read_every
        self.steps = 0
        self.seconds = 0.0
        self.validation: list[Record] = []
        self._history: list[Record] = []
        self._pending: list[Pending] = []
        self._device_step: DeviceStep | None = None
        self._warned_about: torch.optim.Optimizer | None = None

    @property
    def history(self) -> list[Record]:
        self.read()
        return self._history

    def step(self) -> Mapping[str, float]:
        """Make one meta-step, and return its record.

        On the CPU, and for the first step of a run on CUDA, the host reads the record before the
        update. Later steps on CUDA do not synchronise: their records and errors are read when a
        record or `history` is accessed, or after `read_every` steps.

        If the method omits non-finite tasks and all of them are, nothing is applied. On the host,
        an optimizer that evaluates more than once in a step, such as L-BFGS, uses the same batch
        each time; the record describes the first evaluation.

        Raises:
            NonfiniteError: a task is not finite and the method does not omit such tasks. Neither
                this step nor any after it has changed the parameters or the optimizer.
        """
        start = time.perf_counter()
        parts = (self.method, self.source, self.optimizer, self.metrics)
        if self._device_step is not None and not self._device_step.matches(*parts):
            self.read()
            self._device_step = None
        if self._device_step is None:
            values = self._step_on_host()
            self._advance(start)
            return self._keep("train", self.steps, self.seconds, values)
        schedule = ScheduleSnapshot(self.optimizer, self.scheduler)
        deferred = DeferredRecord(self.read)
        pending = Pending(self.seconds, schedule, ref(deferred))
        self._device_step.run(self.steps)
        self._pending.append(pending)
        self._advance(start)
        if len(self._pending) == self._device_step.rows:
            self.read()
        return deferred

    def _advance(self, start: float) -> None:
        """Count a step that began at `start`, and set the learning rates of the next one."""
        self.steps += 1
        self.seconds += time.perf_counter() - start
        self.budget.update(steps=self.steps, seconds=self.seconds)
        if self.scheduler is not None:
            self.scheduler.step()

    def read(self) -> None:
        """Wait for the pending steps, and append their records to `history`.

        Raises:
            NonfiniteError: one of them was refused. `steps` and the scheduler are as before it.
        """
        if not self._pending:
            return
        assert self._device_step is not None
        start = time.perf_counter()
        pending, self._pending = self._pending, []
        first = self.steps - len(pending)
        records = self._device_step.read(range(first, self.steps))
        self.seconds += time.perf_counter() - start
        self.budget.update(steps=self.steps, seconds=self.seconds)
        each = (self.seconds - pending[0].start) / len(pending)
        for number, (step, values) in enumerate(zip(pending, records, strict=True)):
            if values["failed"] > 0 and self.method.nonfinite == "propagate":
                self.steps = first + number
                self.budget.update(steps=self.steps, seconds=self.seconds)
                step.schedule.restore()
                self._device_step.clear_refused()
                error = self._refusal(self._repeated())
                for refused in pending[number:]:
                    if (deferred := refused.record()) is not None:
                        deferred.error = error
                raise error
            seconds = pending[0].start + (number + 1) * each
            record = self._keep("train", first + number + 1, seconds, values)
            if (deferred := step.record()) is not None:
                deferred.record = record

    def _keep(self, split: str, step: int, seconds: float, values: Record) -> Record:
        """The record of a step or a validation, which is appended to the others and logged."""
        record = {"step": step, "seconds": seconds} | values
        (self._history if split == "train" else self.validation).append(record)
        if self.log is not None:
            self.log(split, record)
        return record

    def _step_on_host(self) -> Record:
        """A step whose record is read before the update."""
        batch = TaskBatch.of(self.source.sample(self.steps))
        record = self._evaluate(batch)
        if record["failed"] == 1:
            return record
        evaluated = [record]

        def closure() -> float:
            return (evaluated.pop() if evaluated else self._evaluate(batch))["loss"]

        self._optimisation.step(closure)
        if self.capture is not None:
            self._move_to_device(list(record))
        return record

    def _evaluate(self, batch: TaskBatch) -> Record:
        """Fill the gradients of the learned tensors, and return the record of the batch."""
        own = batch if self.process_group is None else with_some_weight(batch)
        self.method.at_step(self.steps)
        with self._recording():
            out = (self.meta_gradient or self.method.meta_gradient)(own)
        if self.compile == "on" and self.programs is not None:
            self.programs.check()
        gradients, summary = measure(self.method, out, batch, self.metrics, self.process_group)
        numbers = torch.stack(list(summary.values())).tolist()
        record = dict(zip(summary, numbers, strict=True))
        if record["failed"] > 0 and self.method.nonfinite == "propagate":
            raise self._refusal(out)
        for name, tensor in self.method.learned().items():
            tensor.grad = gradients[name]
        return record

    def _recording(self) -> AbstractContextManager[None]:
        # Counted from the start of the training, so that a resumed run takes the same steps.
        if self.programs is None or (self.compile == "auto" and self.steps < _EAGER_STEPS):
            return nullcontext()
        return self.programs.use()

    def _move_to_device(self, names: list[str]) -> None:
        """Let the device decide whether the following steps are applied, if the optimizer can."""
        assert self.capture is not None
        reason = why_not_on_device(self.optimizer)
        if reason is not None:
            if self.optimizer is not self._warned_about:
                self._warned_about = self.optimizer
                warnings.warn(f"each meta-step waits for the device: {reason}", stacklevel=4)
            return
        self._device_step = DeviceStep(
            self.method, self.source, self.optimizer, self.metrics,
            names=names, rows=self.read_every, capture=self.capture, group=self.process_group,
        )  # fmt: skip

    def _repeated(self) -> MetaGradient | None:
        """The meta-gradient of this step again; None if its batch is no longer available."""
        if isinstance(self.source, LoaderSource) and not self.source.can_sample(self.steps):
            return None
        return self.method.meta_gradient(self.source.sample(self.steps))

    def _refusal(self, out: MetaGradient | None) -> NonfiniteError:
        group = self.process_group
        where = "" if group is None else f"On rank {rank(group)} of {group.size()}: "
        return NonfiniteError(
            f"meta-step {self.steps}: the meta-gradient is not finite, so it was not applied. "
            f"{where}{'Its batch is no longer available' if out is None else out.describe()}"
        )

    def validate(
        self, source: TaskSource | Iterable[Any], metrics: Mapping[str, Metric], *, tasks: int
    ) -> Record:
        """Evaluate, and append the means, the meta-step and the time to `validation`.

        Tensors of which `average_weights` keeps averages are replaced by these.

        Args:
            source, metrics, tasks: as in `evaluate`.

        Raises:
            TypeError, ValueError: as `evaluate`.
            NonfiniteError: as `read`.
        """
        check_metrics("metrics", metrics, "(params, query)", ENTRIES[:3])
        self.read()
        with self._recording(), averaged(self.optimizer):
            means = evaluate(self.method, source, metrics, tasks=tasks).mean
        return self._keep("val", self.steps, self.seconds, means)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in training, with torch's random state; refers to the tensors.

        Raises:
            NonfiniteError: as `read`.
        """
        self.read()
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "history": list(self._history),
            "validation": list(self.validation),
            **self._optimisation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; records of pending steps are dropped.

        Raises:
            Exception: the state does not match this trainer. Nothing has changed.
        """
        counted = state["steps"], state["seconds"]
        records = list(state["history"]), list(state["validation"])
        self._optimisation.load_state_dict(state)
        self._device_step, self._pending = None, []
        self.steps, self.seconds = counted
        self._history, self.validation = records
        self.budget.update(steps=self.steps, seconds=self.seconds)

    @property
    def _optimisation(self) -> Optimisation:
        return Optimisation(self.method, self.optimizer, self.scheduler)

    def save(self, path: str | Path, config: dict[str, Any] | None = None) -> None:
        """Write `state_dict()` to a file, atomically. In a process group only rank 0 writes.

        Args:
            path: the file to write.
            config: saved with the state; must be serialisable as JSON.

        Raises:
            NonfiniteError: as `read`.
            OSError: the file cannot be written.
        """
        state = self.state_dict()
        if rank(self.process_group) == 0:
            checkpoint.save_checkpoint(path, {"config": json.dumps(config or {}), **state})

    def load(self, path: str | Path) -> None:
        """Resume from a checkpoint; on the CPU, bit for bit as if training had not stopped.

        Torch's random state, which dropout uses, is restored too. In a process group the ranks
        other than 0 are reseeded. The position of a DataLoader, or of another iterable that is not
        a list, is not restored: with a warning, the training continues with its next batches.

        Args:
            path: a checkpoint that `save` wrote.

        Raises:
            FileNotFoundError, ValueError: as `load_checkpoint`, or the checkpoint belongs
                to other parameters, or to another optimizer or scheduler. Nothing has changed.
        """
        state = checkpoint.load_checkpoint(path, training=True)
        if self.process_group is not None:
            check_same(state["steps"], f"{path} is at meta-step", self.process_group)
        with checkpoint.loading_from(path):
            self.load_state_dict(state)
        arguments.warn_unless_repeatable(self.source)
        if rank(self.process_group) > 0:  # so that ranks draw different dropout masks
            torch.manual_seed(
                int(torch.randint(2**62, (), device="cpu")) + rank(self.process_group)
            )
