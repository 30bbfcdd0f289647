"""The result of every method, and its mean over tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_choice
from imaml_ext._tracing import may_read_values
from imaml_ext.ops.rows import is_not_finite
from imaml_ext.problem.layout import Params
from imaml_ext.solvers.solution import Solution, Status, counted

Nonfinite = Literal["propagate", "omit"]


@dataclass(frozen=True)
class MetaGradient:
    """The meta-gradient of a batch of B tasks, with a report.

    Attributes:
        params: mean over tasks of dL_i/dtheta, tensors of theta's shapes.
        lam: the same for Λ, in lam's form; None if lam is a float.
        support_loss, query_loss: at phi, [B].
        adapted: phi, {name: [B, ...]}.
        inner: the inner solve. `residual` is `‖∇G_i(phi_i)‖` and `error_estimate` estimates
            `‖phi_i - phi_i*‖`, delta of the paper's Algorithm 2. The estimate needs the curvature
            of G_i: it is not available with `curvature="ggn"`, whose smallest eigenvalue is at
            least that of Λ even at a saddle point, or from a method without a linear solve.
        linear: the linear solve; None from a method without one.
        hyperparameters: gradients of the other learned tensors: those of a `StepSize`, such as
            "log_lr", and "lam.NAME" of a `ProximalStrength`.
        shared: gradients of the shared parameters, {name: tensor}.
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

    def named(self) -> Params:
        """Every gradient by name: parameters under their own names, lam as "lam" or "lam.NAME"."""
        return self.params | named_lam(self.lam) | self.hyperparameters | self.shared

    @property
    def failed(self) -> Tensor:
        """Tasks whose losses or solves are not finite, [B] bool."""
        return failed_tasks(self.query_loss, *self._solves.values())

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
        params, lam, support_loss, query_loss, adapted, inner, hyperparameters, shared: as in
            `MetaGradient`.
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


def task_weight(ok: Tensor, nonfinite: Nonfinite, dtype: torch.dtype) -> Tensor:
    """Weight of each task in the mean over the tasks that are ok, [B] bool; 0-d.

    With "propagate" it is NaN if any task is not ok. In theta's dtype, since 1 / tasks as a 0-d
    float32 tensor would round a float64 gradient.
    """
    if may_read_values(ok):
        done = int(ok.sum())
        one = 1 / max(done, 1) if nonfinite == "omit" or done == len(ok) else math.nan
        return torch.full((), one, dtype=dtype, device=ok.device)
    counted = ok.sum().to(dtype)
    if nonfinite == "omit":
        return 1 / counted.clamp_min(1)
    return torch.where(counted == len(ok), 1 / counted, torch.nan)
