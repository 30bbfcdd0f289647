"""The outer loop: meta-gradients into any `torch.optim` optimizer, and checkpoints."""

import copy
import inspect
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch, TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import MetaGradient
from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.training.budget import Budget
from imaml_ext.training.capture import Capture, cuda_graph, no_capture
from imaml_ext.training.checkpoint import (
    check_loadable,
    load_checkpoint,
    random_states,
    restore,
    restore_random,
    save_checkpoint,
)
from imaml_ext.training.device_step import DeviceStep, why_not_on_device
from imaml_ext.training.distributed import Group, broadcast_parameters, check_same, rank, shard
from imaml_ext.training.evaluation import Metric, evaluate
from imaml_ext.training.logs import Log, Record
from imaml_ext.training.record import DeferredRecord, measure


class NonfiniteError(ArithmeticError):
    """A meta-gradient with a task that is not finite was refused; nothing was updated."""


class Trainer:
    """Meta-training: `optimizer` steps along the meta-gradients of the batches of `source`.

    On CUDA the whole meta-step is recorded once and replayed, and nothing in it synchronises; see
    docs/recording.md for what it asks of the model, the source and the optimizer, and what happens
    where they cannot give it: no_capture, long solves wait for the device now and then.

    Args:
        method: owns what is learned.
        source: deals a batch for each step.
        optimizer: over the tensors of `method.learned()`; default Adam with lr 1e-3. On CUDA it
            should be capturable.
        scheduler: of the optimizer's learning rate, stepped with it.
        metrics: reported beside the loss, by name; evaluated on the query set at phi.
        meta_gradient: in place of `method.meta_gradient`, as a `RecordedMetaGradient` of it; on the
            CPU.
        capture: how to record a meta-step; default `cuda_graph` on CUDA, where `no_capture` runs
            each as it is. On the CPU steps are decided on the host, unless a capture is given.
        read_every: steps after which their records are read from the device.
        budget: kept up to date with the steps and seconds spent; a schedule may read it.
        log: called with "train" or "val" and each record, in their order, when it is known.
        process_group: of `torch.distributed`: its processes share the tasks of each batch, start
            from rank 0's parameters (and what else a `module_loss` model holds), and go on as one
            process with all the tasks would; see docs/distributed.md. On CUDA their meta-steps are
            not recorded, unless a capture is given.

    Attributes:
        source: deals this process's tasks.
        steps: meta-steps made.
        seconds: time spent in `step` and `read`, over all runs of this training. Of steps that are
            read together each record has its share.
        history: one record a step; reads what was not read yet.
        validation: one record a call of `validate`.
    """

    def __init__(
        self,
        method: Method,
        source: TaskSource,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        metrics: dict[str, Metric] | None = None,
        meta_gradient: Callable[[TaskBatch], MetaGradient] | None = None,
        capture: Capture | None = None,
        read_every: int = 50,
        budget: Budget | None = None,
        log: Log | None = None,
        process_group: Group | None = None,
    ) -> None:
        if read_every < 1:
            raise ValueError(f"read_every must be at least 1, got {read_every}")
        on_cuda = is_on_cuda(method)
        if meta_gradient is not None and (on_cuda or capture is not None):
            raise ValueError(
                "meta_gradient is for the CPU: whole meta-steps are recorded elsewhere"
            )
        self.method = method
        self.process_group = process_group
        self.source = shard(source, process_group)
        if process_group is not None:
            broadcast_parameters(_tensors_of(method), process_group)
        self.optimizer = optimizer or torch.optim.Adam(
            method.learned().values(), lr=1e-3, capturable=on_cuda
        )
        self.scheduler = scheduler
        self.metrics = metrics or {}
        self.meta_gradient = meta_gradient
        if capture is None and on_cuda:
            capture = cuda_graph if process_group is None else no_capture
        self.capture = capture
        self.budget = budget or Budget()
        self.log = log
        self.read_every = read_every
        self.steps = 0
        self.seconds = 0.0
        self.validation: list[Record] = []
        self._history: list[Record] = []
        self._pending: list[DeferredRecord] = []
        self._device_step: DeviceStep | None = None
        self._warned_of: torch.optim.Optimizer | None = None

    @property
    def history(self) -> list[Record]:
        self.read()
        return self._history

    def step(self) -> Mapping[str, float]:
        """One meta-step. On the CPU, and the first of a run on CUDA, it is decided on the host.

        The others on CUDA synchronise nothing: the record that they return, `history` and the error
        wait until it is asked for or `read_every` of them were made.

        If the method skips tasks that are not finite and all of them are, nothing is applied. On
        the host, an optimizer that evaluates more than once in a step, as L-BFGS does, sees the
        same batch; the record is of the first time.

        Raises:
            NonfiniteError: a task is not finite and the method does not skip such tasks. Neither
                the parameters nor the optimizer have changed in that step, nor after it.
        """
        start = time.perf_counter()
        parts = (self.method, self.source, self.optimizer, self.metrics)
        if self._device_step is not None and not self._device_step.is_of(*parts):
            self.read()
            self._device_step = None
        record: Mapping[str, float]
        if self._device_step is None:
            values = self._step_on_host()
            self._advance(start)
            record = {"step": self.steps, "seconds": self.seconds} | values
            self._remember(record)
        else:
            late = DeferredRecord(self.read, self.seconds, *self._schedule())
            self._device_step.run(self.steps)
            self._pending.append(late)
            self._advance(start)
            record = late
            if len(self._pending) == self._device_step.rows:
                self.read()
        return record

    def _advance(self, start: float) -> None:
        """Count a step that began at `start`, and set the learning rates of the next one."""
        self.steps += 1
        self.seconds += time.perf_counter() - start
        self._update_budget()
        if self.scheduler is not None:
            self.scheduler.step()

    def _update_budget(self) -> None:
        self.budget.update(steps=self.steps, seconds=self.seconds)

    def read(self) -> None:
        """Wait for the steps that were made, and add their records to `history`.

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
        self._update_budget()
        spent = (self.seconds - pending[0].begun) / len(pending)  # each, on the device
        for number, (late, values) in enumerate(zip(pending, records, strict=True)):
            if values["failed"] > 0 and self.method.nonfinite == "propagate":
                self.steps = first + number
                self._update_budget()
                self._restore_schedule(late.schedule, late.rates)
                self._device_step.clear_refused()
                error = self._refusal(self.method.meta_gradient(self.source.sample(self.steps)))
                for refused in pending[number:]:
                    refused.error = error
                raise error
            seconds = pending[0].begun + (number + 1) * spent
            late.filled = {"step": first + number + 1, "seconds": seconds} | values
            self._remember(late.filled)

    def _remember(self, record: Record) -> None:
        self._history.append(record)
        if self.log is not None:
            self.log("train", record)

    def _step_on_host(self) -> Record:
        """A step that looks at its meta-gradient before it applies it."""
        batch = self.source.sample(self.steps)
        record = self._evaluate(batch)
        applied = record["failed"] < 1
        if applied:
            evaluated = [record]

            def closure() -> float:
                return (evaluated.pop() if evaluated else self._evaluate(batch))["loss"]

            before = copy.deepcopy(self._state()) if _asks_again(self.optimizer) else None
            try:
                self.optimizer.step(closure)
            except NonfiniteError:
                if before is not None:  # it had moved already
                    self._take(before, "")
                raise
        if applied and self.capture is not None:
            self._go_to_device(list(record))
        return record

    def _evaluate(self, batch: TaskBatch) -> Record:
        """Fill the gradients of what is learned, and say how the batch went."""
        out = (self.meta_gradient or self.method.meta_gradient)(batch)
        gradients, summary = measure(self.method, out, batch, self.metrics, self.process_group)
        numbers = torch.stack(list(summary.values())).tolist()
        record = dict(zip(summary, numbers, strict=True))
        if record["failed"] > 0 and self.method.nonfinite == "propagate":
            raise self._refusal(out)
        for name, tensor in self.method.learned().items():
            tensor.grad = gradients[name]
        return record

    def _go_to_device(self, names: list[str]) -> None:
        """Decide the steps from here on on the device, if the optimizer can."""
        assert self.capture is not None
        reason = why_not_on_device(self.optimizer)
        if reason is not None:
            if self.optimizer is not self._warned_of:
                self._warned_of = self.optimizer
                warnings.warn(f"each meta-step waits for the device: {reason}", stacklevel=4)
            return
        self._device_step = DeviceStep(
            self.method, self.source, self.optimizer, self.metrics,
            names=names, rows=self.read_every, capture=self.capture, group=self.process_group,
        )  # fmt: skip

    def _refusal(self, out: MetaGradient) -> "NonfiniteError":
        where = ""
        if self.process_group is not None:
            where = f"On rank {rank(self.process_group)} of {self.process_group.size()}: "
        return NonfiniteError(
            f"meta-step {self.steps}: the meta-gradient is not finite, so it was not applied. "
            f"{where}{out.describe()}"
        )

    def _schedule(self) -> tuple[dict[str, Any], list[Any]]:
        """The scheduler's state, and the learning rates."""
        state = self.scheduler.state_dict() if self.scheduler else {}
        return state, [_value(group["lr"]) for group in self.optimizer.param_groups]

    def _restore_schedule(self, state: dict[str, Any], rates: list[Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

    def validate(self, source: TaskSource, metrics: dict[str, Metric], *, tasks: int) -> Record:
        """Evaluate and remember the means with the meta-step and the time.

        Args:
            source: deals the tasks.
            metrics, tasks: as in `evaluate`.

        Raises:
            NonfiniteError: as `read`.
        """
        self.read()
        means = evaluate(self.method, source, metrics, tasks=tasks).mean
        record = {"step": self.steps, "seconds": self.seconds, **means}
        self.validation.append(record)
        if self.log is not None:
            self.log("val", record)
        return record

    def save(self, path: str | Path, config: dict[str, Any] | None = None) -> None:
        """Write everything that `load` needs to go on, atomically. Of many processes rank 0 does.

        Args:
            path: of the file.
            config: kept beside it; anything that JSON can hold.

        Raises:
            NonfiniteError: as `read`.
            TypeError: the optimizer's or the scheduler's settings hold what `load` would refuse.
        """
        self.read()
        if rank(self.process_group) == 0:
            state = self._state()
            check_loadable(path, [state["optimizer"]["param_groups"], state["scheduler"]])
            save_checkpoint(path, {"config": json.dumps(config or {}), **state})

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint; on the CPU, bit for bit as if the training had not stopped.

        Restores torch's random state too, which dropout draws from; ranks other than 0 of a group
        draw anew.

        Args:
            path: of a checkpoint that `save` wrote.

        Raises:
            FileNotFoundError, ValueError: as `load_checkpoint`, or the checkpoint is of other
                parameters, or of another optimizer or scheduler than this trainer's. Nothing has
                changed.
        """
        state = load_checkpoint(path, training=True)
        if self.process_group is not None:
            check_same(state["steps"], f"{path} is at meta-step", self.process_group)
        if state["optimizer_class"] != type(self.optimizer).__name__:
            raise ValueError(
                f"{path} holds the state of {state['optimizer_class']}, "
                f"but the optimizer is {type(self.optimizer).__name__}"
            )
        before = copy.deepcopy(self._state())
        unread = self._device_step, self._pending, self._history, self.validation
        try:
            self._take(state, path)
        except Exception as error:  # torch checks less than all, and raises anything
            self._take(before, path)
            self._device_step, self._pending, self._history, self.validation = unread
            said = str(error).partition("\n")[0]
            raise ValueError(
                said if str(path) in said else f"{path} does not fit: {said}"
            ) from error
        if rank(self.process_group) > 0:  # other masks for other tasks
            torch.manual_seed(int(torch.randint(2**62, ())) + rank(self.process_group))

    def _state(self) -> dict[str, Any]:
        """Everything that changes in training."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self._history,
            "validation": self.validation,
            "learned": {name: t.detach() for name, t in self.method.learned().items()},
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "random": random_states(cuda=is_on_cuda(self.method)),
        }

    def _take(self, state: dict[str, Any], path: str | Path) -> None:
        own_scheduler = self.scheduler.state_dict() if self.scheduler else {}
        if state["scheduler"].keys() != own_scheduler.keys():
            raise ValueError(f"{path} holds the state of another scheduler, or of none")
        restore(self.method.learned(), state, path)
        restore_random(state["random"])
        groups = self.optimizer.param_groups
        for saved, own in zip(state["optimizer"]["param_groups"], groups, strict=False):
            if "capturable" in own:  # on which device it runs is not the checkpoint's to say
                saved["capturable"] = own["capturable"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._device_step, self._pending = None, []
        self.steps, self.seconds = state["steps"], state["seconds"]
        self._update_budget()
        self._history, self.validation = state["history"], state["validation"]


def _asks_again(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step needs a closure, and may call it more than once, as that of L-BFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _tensors_of(method: Method) -> Params:
    """What a method learns, and what the models of its losses hold beside it."""
    tensors = dict(method.learned())
    for number, loss in enumerate((method.loss, method.query_loss)):
        if isinstance(loss, ModuleLoss):
            held = (*loss.model.named_parameters(), *loss.model.named_buffers())
            tensors |= {f"{number} {name}": tensor for name, tensor in held}
    return tensors


def is_on_cuda(method: Method) -> bool:
    return any(tensor.is_cuda for tensor in method.learned().values())


def _value(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate
