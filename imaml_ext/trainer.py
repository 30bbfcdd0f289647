"""The outer loop: meta-gradients into any `torch.optim` optimizer, evaluation, checkpoints."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from imaml_ext.checkpoint import load_checkpoint, save_checkpoint
from imaml_ext.flat import Params
from imaml_ext.methods import Method
from imaml_ext.solution import Status
from imaml_ext.tasks import TaskBatch, TaskSource

Metric = Callable[[Params, Any], Tensor]  # (phi, query) -> scalar, for one task
SupportMetric = Callable[[Params, Any, Any], Tensor]  # (phi, support, query) -> scalar
Record = dict[str, float]


class NonfiniteError(ArithmeticError):
    """A meta-gradient with a task that is not finite was refused; nothing was updated."""


class Trainer:
    """Meta-training: `optimizer` steps along the meta-gradients of the batches of `source`.

    Args:
        method: owns what is learned.
        source: deals a batch for each step.
        optimizer: over the tensors of `method.learned()`; default Adam with lr 1e-3.
        scheduler: of the optimizer's learning rate, stepped with it.
        metrics: reported beside the loss, by name; evaluated on the query set at phi.

    Attributes:
        steps: meta-steps made.
        seconds: time spent in `step`, over all runs of this training.
        history: one record a step.
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
    ) -> None:
        self.method = method
        self.source = source
        self.optimizer = optimizer or torch.optim.Adam(method.learned().values(), lr=1e-3)
        self.scheduler = scheduler
        self.metrics = metrics or {}
        self.steps = 0
        self.seconds = 0.0
        self.history: list[Record] = []
        self.validation: list[Record] = []

    def step(self) -> Record:
        """One meta-step. Its record is read from the device once, to decide whether to apply it.

        If the method skips tasks that are not finite and all of them are, nothing is applied. An
        optimizer that evaluates more than once in a step, as L-BFGS does, sees the same batch; the
        record is of the first time.

        Raises:
            NonfiniteError: a task is not finite and the method does not skip such tasks. Neither
                the parameters nor the optimizer have changed.
        """
        start = time.perf_counter()
        batch = self.source.sample(self.steps)
        record = self._evaluate(batch)
        if record["failed"] < 1:
            evaluated = [record]

            def closure() -> float:
                return (evaluated.pop() if evaluated else self._evaluate(batch))["loss"]

            self.optimizer.step(closure)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        self.seconds += time.perf_counter() - start
        record = {"step": self.steps, "seconds": self.seconds} | record
        self.history.append(record)
        return record

    def _evaluate(self, batch: TaskBatch) -> Record:
        """Fill the gradients of what is learned, and say how the batch went."""
        out = self.method.meta_gradient(batch)
        values = {
            "loss": out.query_loss,
            "support_loss": out.support_loss,
            **{name: _per_task(m, out.adapted, batch.query) for name, m in self.metrics.items()},
            "inner_residual": out.inner.residual,
        }
        if out.cg is not None:
            values["cg_residual"] = out.cg.residual
            values["negative_curvature"] = out.cg.status == Status.NEGATIVE_CURVATURE
        failed = out.failed
        means = [
            torch.where(failed, 0, v.double()).sum() / (~failed).sum() for v in values.values()
        ]
        values["failed"] = failed
        numbers = torch.stack([*means, failed.double().mean()]).tolist()
        record = dict(zip(values, numbers, strict=True))
        if record["failed"] > 0 and self.method.nonfinite == "refuse":
            raise NonfiniteError(
                f"meta-step {self.steps}: the meta-gradient is not finite, so it was not applied. "
                f"{out.describe()}"
            )
        gradients = out.named()
        for name, tensor in self.method.learned().items():
            tensor.grad = gradients[name]
        return record

    def validate(self, source: TaskSource, metrics: dict[str, Metric], *, tasks: int) -> Record:
        """Evaluate and remember the means with the meta-step and the time."""
        means = evaluate(self.method, source, metrics, tasks=tasks).mean
        record = {"step": self.steps, "seconds": self.seconds, **means}
        self.validation.append(record)
        return record

    def save(self, path: str | Path, config: dict[str, Any] | None = None) -> None:
        """Write everything that `load` needs to go on, atomically.

        Args:
            config: kept beside it; anything that JSON can hold.
        """
        state = {
            "config": json.dumps(config or {}),
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self.history,
            "validation": self.validation,
            "learned": {name: t.detach() for name, t in self.method.learned().items()},
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "random": _random_states(self.method),
        }
        save_checkpoint(path, state)

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint; on the CPU, bit for bit as if the training had not stopped.

        Restores torch's random state too, which dropout draws from.

        Raises:
            FileNotFoundError, ValueError: as `load_checkpoint`, or the checkpoint is of other
                parameters or of another optimizer than this trainer's.
        """
        state = load_checkpoint(path, training=True)
        if state["optimizer_class"] != type(self.optimizer).__name__:
            raise ValueError(
                f"{path} holds the state of {state['optimizer_class']}, "
                f"but the optimizer is {type(self.optimizer).__name__}"
            )
        restore(self.method, state, path)
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"]["cuda"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.history, self.validation = state["history"], state["validation"]


def _random_states(method: Method) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if any(tensor.is_cuda for tensor in method.learned().values()):
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(method: Method, state: dict[str, Any], path: str | Path) -> None:
    """Copy a checkpoint's learned tensors into the method's.

    Raises:
        ValueError: names or shapes differ.
    """
    learned = method.learned()
    expected = {name: list(tensor.shape) for name, tensor in learned.items()}
    found = {name: list(tensor.shape) for name, tensor in state["learned"].items()}
    if found != expected:
        names = [n for n in {**found, **expected} if found.get(n) != expected.get(n)]
        first = names[0]
        raise ValueError(
            f"{path} is of another model: {len(names)} tensors differ, such as {first!r}: "
            f"{found.get(first)}, expected {expected.get(first)}"
        )
    with torch.no_grad():
        for name, tensor in learned.items():
            tensor.copy_(state["learned"][name])


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks, and half-widths of their 95% intervals, `1.96 std / sqrt(tasks)`."""

    mean: dict[str, float]
    ci95: dict[str, float]
    tasks: int


@torch.no_grad()
def evaluate(
    method: Method,
    source: TaskSource,
    metrics: dict[str, Metric],
    *,
    tasks: int,
    support_metrics: dict[str, SupportMetric] | None = None,
) -> Evaluation:
    """Adapt to `tasks` tasks of `source` (its steps 0, 1, ...) and judge on their query sets.

    Args:
        support_metrics: see the support set beside the query set; reported as "support_NAME".
    """
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}")
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    values |= {f"support_{name}": [] for name in support_metrics or {}}
    seen, step = 0, 0
    while seen < tasks:
        batch = source.sample(step)
        phi = method.adapt(batch.support)
        for name, metric in metrics.items():
            values[name].append(_per_task(metric, phi, batch.query))
        for name, joint in (support_metrics or {}).items():
            values[f"support_{name}"].append(_per_task(joint, phi, batch.support, batch.query))
        seen += next(iter(phi.values())).shape[0]
        step += 1
    joined = {name: torch.cat(parts)[:tasks].double() for name, parts in values.items()}
    return Evaluation(
        mean={name: v.mean().item() for name, v in joined.items()},
        ci95={
            name: 1.96 * v.std(correction=0).item() / math.sqrt(tasks) for name, v in joined.items()
        },
        tasks=tasks,
    )


def accuracy(outputs: Callable[[Params, Any], Tensor]) -> Metric:
    """Share of a task's examples whose largest output is at the label."""

    def metric(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return (outputs(params, x).argmax(-1) == y).float().mean()

    return metric


def support_accuracy(outputs: Callable[[Params, Any, Any], Tensor]) -> SupportMetric:
    """As `accuracy`, of outputs for query examples that have seen the support examples."""

    def metric(params: Params, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> Any:
        x, y = query
        return (outputs(params, support[0], x).argmax(-1) == y).float().mean()

    return metric


def _per_task(metric: Callable[..., Tensor], params: Params, *data: Any) -> Tensor:
    with torch.no_grad():
        return vmap(metric, randomness="different")(params, *data)
