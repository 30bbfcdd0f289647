"""Evaluating a method on many tasks: means of metrics, with confidence intervals."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from imaml_ext._checks import (
    check_callable,
    check_instance,
    check_integer,
    check_not_of_torch,
    check_scalar,
    kind_of,
)
from imaml_ext.data.mini_batches import split_batches
from imaml_ext.data.tasks import TaskSource, batches
from imaml_ext.methods.base import Method
from imaml_ext.ops.vmap_layers import task_layers
from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.problem.precision import one_precision

Metric = Callable[[Params, Any], Tensor]  # (phi, query) -> scalar, for one task
SupportMetric = Callable[[Params, Any, Any], Tensor]  # (phi, support, query) -> scalar


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks, with confidence intervals.

    Attributes:
        mean: mean of each metric, by name, in its units: `accuracy` is in [0, 1], not in percent.
        ci95: half-widths of their 95% intervals, `1.96 std / sqrt(tasks)`.
        tasks: number of tasks.
    """

    mean: dict[str, float]
    ci95: dict[str, float]
    tasks: int


@torch.no_grad()
def evaluate(
    method: Method,
    source: TaskSource | Iterable[Any],
    metrics: Mapping[str, Metric],
    *,
    tasks: int,
    support_metrics: Mapping[str, SupportMetric] | None = None,
) -> Evaluation:
    """Adapt to the first `tasks` tasks of `source`, and evaluate on their query sets.

    Args:
        method: adapts by `method.adapt`; nothing is learned.
        source: samples the tasks, any number at a time, at its steps 0, 1, ...; or an iterable of
            batches, such as a DataLoader, as in `Trainer`. Each call iterates over it once.
        metrics: `(phi, query) -> 0-d tensor` for one task, by name, such as a loss or `accuracy`.
        tasks: number of tasks; excess tasks of the last batch are not counted.
        support_metrics: `(phi, support, query) -> 0-d tensor` for one task; reported as
            "support_NAME". Of `MiniBatches` they receive the data.

    Raises:
        TypeError: an argument has the wrong type, or a metric does not return a tensor.
        ValueError: tasks is below 1, the source has fewer, a batch does not fit the parameters or
            has weights, a metric is not a scalar, or two have the same name.
    """
    check_instance("method", method, Method, "pass one, such as IMAML(loss, params)")
    check_integer("tasks", tasks, minimum=1)
    support_metrics = support_metrics or {}
    check_metrics("metrics", metrics, "(params, query)")
    check_metrics("support_metrics", support_metrics, "(params, support, query)")
    if not (metrics or support_metrics):
        raise ValueError("metrics is empty: there is nothing to evaluate")
    for name in metrics.keys() & {f"support_{name}" for name in support_metrics}:
        raise ValueError(f"metrics and support_metrics both report {name!r}: rename one of them")
    values: dict[str, list[Tensor]] = defaultdict(list)
    seen = 0
    for batch in batches(source, method.layout.device):
        if batch.weights is not None:
            raise ValueError(
                "a batch has weights, but evaluate counts every task once: leave out padding "
                "tasks, and pass batches without weights"
            )
        support, _ = split_batches(batch.support)
        phi = method.with_shared(method.adapt(batch.support))
        for name, metric in metrics.items():
            label = f"metrics[{name!r}]"
            values[name].append(per_task(metric, phi, batch.query, label=label))
        for name, joint in support_metrics.items():
            label, data = f"support_metrics[{name!r}]", (support, batch.query)
            values[f"support_{name}"].append(per_task(joint, phi, *data, label=label))
        seen += next(iter(phi.values())).shape[0]
        if seen >= tasks:
            break
    else:
        raise ValueError(f"source has only {seen} tasks, got tasks={tasks}")
    joined = {name: torch.cat(parts)[:tasks].double() for name, parts in values.items()}
    return Evaluation(
        mean={name: v.mean().item() for name, v in joined.items()},
        ci95={
            name: 1.96 * v.std(correction=0).item() / math.sqrt(tasks) for name, v in joined.items()
        },
        tasks=tasks,
    )


def check_metrics(
    label: str, metrics: Any, parameters: str, reserved: Collection[str] = ()
) -> None:
    """Raises TypeError for anything but functions by name, ValueError for a reserved name."""
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{label} must map names to functions of {parameters}, got {kind_of(metrics)}: "
            "pass a dict such as {'loss': method.loss}"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"the names in {label} must be strings, got {name!r}")
        if name in reserved:
            raise ValueError(f"{label}[{name!r}] is an entry of every record: rename it")
        remedy = "pass a loss from module_loss, or accuracy(loss.outputs)"
        check_callable(f"{label}[{name!r}]", metric, parameters)
        check_not_of_torch(f"{label}[{name!r}]", metric, parameters, remedy)
        if getattr(metric, "__func__", None) is ModuleLoss.outputs:
            raise TypeError(f"{label}[{name!r}] returns outputs, not a metric: {remedy}")


def accuracy(outputs: Callable[[Params, Any], Tensor]) -> Metric:
    """Fraction of a task's examples whose largest output is at the label, in [0, 1].

    Args:
        outputs: maps (params, x) to [N, classes], as `module_loss(...).outputs` does.

    Returns:
        A metric `(params, (x, y)) -> 0-d tensor`, y int64 [N].

    Raises:
        TypeError: `outputs` is not such a function.
    """
    check_callable("outputs", outputs, "(params, x)")
    if isinstance(outputs, ModuleLoss):
        raise TypeError("outputs must return outputs, got a loss: pass loss.outputs")

    def metric(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return (outputs(params, x).argmax(-1) == y).float().mean()

    return metric


def support_accuracy(outputs: Callable[[Params, Any, Any], Tensor]) -> SupportMetric:
    """As `accuracy`, for outputs that depend on the support examples.

    Args:
        outputs: maps (params, support x, query x) to [N, classes], as a `SupportStatistics` does.

    Returns:
        A metric `(params, support, query) -> 0-d tensor`.

    Raises:
        TypeError: `outputs` is not such a function.
    """
    check_callable("outputs", outputs, "(params, support_x, query_x)")

    def metric(params: Params, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> Any:
        return accuracy(lambda params, x: outputs(params, support[0], x))(params, query)

    return metric


def per_task(
    metric: Callable[..., Tensor], params: Params, *data: Any, label: str = "the metric"
) -> Tensor:
    """The metric of each task, [B], without a graph.

    Args:
        metric: `(params, *data) -> 0-d tensor` for one task.
        params: phi, {name: [B, ...]}.
        data: pytrees of [B, ...] tensors.
        label: name of the metric in error messages.

    Raises:
        TypeError: the metric does not return a real tensor.
        ValueError: it is not 0-d.
        RuntimeError: the metric reads the value of a tensor.
    """

    leaves = pytree.tree_leaves((params, data))
    device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))

    def one(*operands: Any) -> Tensor:
        with task_layers(device):
            value = metric(*operands)
        check_scalar(label, value)
        return value

    try:
        with torch.no_grad(), one_precision(device):
            return vmap(one, randomness="different")(params, *data)
    except RuntimeError as error:
        if not str(error).startswith("vmap: It looks like"):
            raise
        raise RuntimeError(
            f"{label} reads the value of a tensor, by .item(), if or the like: return a 0-d tensor"
        ) from error
