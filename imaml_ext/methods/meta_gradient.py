"""The result of every method, and its mean over tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_choice, kind_of
from imaml_ext._tracing import may_read_values
from imaml_ext.ops.rows import is_not_finite
from imaml_ext.problem.layout import Params
from imaml_ext.solvers.solution import Solution, Status, counted

Nonfinite = Literal["propagate", "omit"]


@dataclass(frozen=True)
class MetaGradient:
    """The meta-gradient of a batch of B tasks, with a report.

    Attributes:
        params: mean over tasks of dL_i/dtheta, tensors of theta's shapes; weighted if there are
            weights.
        lam: the gradient of the mean query loss with respect to Λ, in lam's form; None if lam is a
            float, or constant in an unrolled method.
        support_loss, query_loss: at phi, [B].
        adapted: phi, {name: [B, ...]}.
        inner: the inner solve. `residual` is `‖∇G_i(phi_i)‖` and `error_estimate` estimates
            `‖phi_i - phi_i*‖`, delta of the paper's Algorithm 2. The estimate needs the curvature
            of G_i: it is not available with `curvature="ggn"`, whose smallest eigenvalue is at
            least that of Λ even at a saddle point, or from a method without a linear solve.
        linear: the linear solve; None from a method without one.
        hyperparameters: gradients of the other learned tensors: those of a `StepSize`, such as
            "log_lr", and those of a `ProximalStrength`, as "lam.NAME".
        shared: gradients of the shared parameters, {name: tensor}.
        weights: relative weights of the tasks in the mean, [B]: those given, divided by the largest
            of them; None if all are equal.
    """

    params: Params
    lam: Any
    support_loss: Tensor
    query_loss: Tensor
    adapted: Params
    inner: Solution
    linear: Solution | None
    hyperparameters: Params = field(default_factory=dict)
    shared: Params = field(default_factory=dict)
    weights: Tensor | None = None

    def named(self) -> Params:
        """Every gradient by name: parameters under their own names, lam as "lam" or "lam.NAME"."""
        return self.params | named_lam(self.lam) | self.hyperparameters | self.shared

    @property
    def failed(self) -> Tensor:
        """Tasks whose losses, solves or weights are not finite, [B] bool; not those of weight 0."""
        failed = failed_tasks(self.query_loss, *self._solves.values())
        return failed if self.weights is None else counted_failures(failed, self.weights)

    def describe(self) -> str:
        """The statuses of each solve, with remedies, in one line. Synchronises on CUDA."""
        parts, explained = [], set[int]()
        for name, solve in self._solves.items():
            parts.append(f"{name} solve: {solve.describe(explained)}")
            explained.update(solve.status.tolist())
        # A query loss that is not finite fails its task even if no gradient of it was computed.
        statuses = torch.stack([solve.status for solve in self._solves.values()])
        by_loss_alone = self.failed & (statuses != Status.NONFINITE).all(0)
        tasks = by_loss_alone.nonzero()[:, 0].tolist()
        if tasks:
            parts.append(f"Query loss: NONFINITE: {counted(tasks, len(by_loss_alone))}")
        return ". ".join(parts)

    @property
    def _solves(self) -> dict[str, Solution]:
        solves = {"Inner": self.inner, "Linear": self.linear}
        return {name: solve for name, solve in solves.items() if solve is not None}


@dataclass(frozen=True)
class ImplicitMetaGradient(MetaGradient):
    """A meta-gradient computed by a linear solve, from `implicit_meta_grad` and `IMAML`.

    Attributes:
        params, lam, support_loss, query_loss, adapted, inner, hyperparameters, shared, weights: as
            in `MetaGradient`.
        linear: the linear solve; `error_estimate` estimates `‖x_i - x_i*‖`, delta' of Algorithm 2,
            for the system that was solved, damping included.
    """

    linear: Solution


for _result in (MetaGradient, ImplicitMetaGradient):
    pytree.register_dataclass(_result)


def named_lam(lam: Any) -> Params:
    """The tensors of lam, or of its gradient, as "lam" or "lam.NAME"; none of a plain number."""
    if isinstance(lam, Mapping):
        return {f"lam.{name}": tensor for name, tensor in lam.items()}
    return {"lam": lam} if isinstance(lam, Tensor) else {}


def check_nonfinite(nonfinite: Nonfinite) -> None:
    check_choice("nonfinite", nonfinite, ("propagate", "omit"))


def failed_tasks(values: Tensor, *solves: Solution) -> Tensor:
    """Tasks whose value [B] or one of whose solves is not finite, [B] bool."""
    failed = is_not_finite(values)
    for solve in solves:
        failed = failed | (solve.status == Status.NONFINITE)
    return failed


def relative_weights(weights: Any, tasks: int, like: Tensor) -> Tensor | None:
    """Weights of tasks divided by the largest, [B] in the dtype of `like`; None for None.

    If one is negative or not finite, or all are 0, all are NaN where values may not be read.

    Raises:
        TypeError: not a tensor of real numbers.
        ValueError: another shape or device, it requires grad, or its values are invalid.
    """
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.is_complex():
        got = weights.dtype if isinstance(weights, Tensor) else kind_of(weights)
        raise TypeError(f"weights must be a tensor of real numbers, got {got}")
    if weights.shape != (tasks,) or weights.device != like.device:
        raise ValueError(
            f"weights must be [{tasks}] on {like.device}, one for each task, "
            f"got {list(weights.shape)} on {weights.device}"
        )
    if weights.requires_grad:
        raise ValueError(
            "weights requires grad, but weights are constants: detach it, or use adapt and weight "
            "its query losses"
        )
    given = weights.to(like.dtype)
    relative = torch.where((given >= 0) & (given < torch.inf), given / given.amax(), torch.nan)
    if may_read_values(given) and not bool((relative >= 0).all()):
        raise ValueError(
            f"weights must be finite, not negative, and not all 0, got {weights.tolist()[:16]}"
        )
    return torch.where(relative.isfinite().all(), relative, torch.nan)


def counted_failures(failed: Tensor, weights: Tensor) -> Tensor:
    """Tasks that failed, or whose weight is NaN; none of weight 0, [B] bool."""
    return (failed | weights.isnan()) & (weights != 0)


def task_weight(
    ok: Tensor, nonfinite: Nonfinite, dtype: torch.dtype, weights: Tensor | None = None
) -> Tensor:
    """Weight of each task in the mean over the tasks that are ok, [B] bool; 0-d.

    With "propagate" it is NaN if any task is not ok. It has theta's dtype, since 1 / tasks as a 0-d
    float32 tensor would round a float64 gradient.

    Args:
        weights: `relative_weights`, [B], by which the caller multiplies: then 1 / their sum.
    """
    if weights is not None:
        total = torch.where(ok, weights, 0.0).sum()
        weight = 1 / total.masked_fill(total == 0, 1.0)  # all that have a weight may have failed
        if nonfinite == "propagate":
            weight = weight.masked_fill(counted_failures(~ok, weights).any(), torch.nan)
        return weight
    if may_read_values(ok):
        done = int(ok.sum())
        one = 1 / max(done, 1) if nonfinite == "omit" or done == len(ok) else math.nan
        return torch.full((), one, dtype=dtype, device=ok.device)
    counted = ok.sum().to(dtype)
    if nonfinite == "omit":
        return 1 / counted.clamp_min(1)
    return torch.where(counted == len(ok), 1 / counted, torch.nan)
