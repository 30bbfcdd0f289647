"""Evaluating a method on many tasks: means of metrics, with confidence intervals."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from imaml_ext._checks import check_integer
from imaml_ext.data.tasks import TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.problem.layout import Params

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
    source: TaskSource,
    metrics: dict[str, Metric],
    *,
    tasks: int,
    support_metrics: dict[str, SupportMetric] | None = None,
) -> Evaluation:
    """Adapt to `tasks` tasks of `source` (its steps 0, 1, ...), and evaluate on their query sets.

    Args:
        method: adapts by `method.adapt`; nothing is learned.
        source: samples the tasks, any number at a time.
        metrics: `(phi, query) -> 0-d tensor` for one task, by name, such as a loss or `accuracy`.
        tasks: number of tasks; excess tasks of the last batch are not counted.
        support_metrics: `(phi, support, query) -> 0-d tensor` for one task; reported as
            "support_NAME".

    Raises:
        TypeError: tasks is not an integer.
        ValueError: tasks is below 1, or a batch does not fit the parameters.
    """
    check_integer("tasks", tasks, minimum=1)
    values: dict[str, list[Tensor]] = defaultdict(list)
    seen, step = 0, 0
    while seen < tasks:
        batch = source.sample(step)
        phi = method.with_shared(method.adapt(batch.support))
        for name, metric in metrics.items():
            values[name].append(per_task(metric, phi, batch.query))
        for name, joint in (support_metrics or {}).items():
            values[f"support_{name}"].append(per_task(joint, phi, batch.support, batch.query))
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
    """Fraction of a task's examples whose largest output is at the label, in [0, 1].

    Args:
        outputs: maps (params, x) to [N, classes], as `module_loss(...).outputs` does.

    Returns:
        A metric `(params, (x, y)) -> 0-d tensor`, y int64 [N].
    """

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
    """

    def metric(params: Params, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> Any:
        return accuracy(lambda params, x: outputs(params, support[0], x))(params, query)

    return metric


def per_task(metric: Callable[..., Tensor], params: Params, *data: Any) -> Tensor:
    """The metric of each task, [B], without a graph.

    Args:
        metric: `(params, *data) -> 0-d tensor` for one task.
        params: phi, {name: [B, ...]}.
        data: pytrees of [B, ...] tensors.
    """
    with torch.no_grad():
        return vmap(metric, randomness="different")(params, *data)
