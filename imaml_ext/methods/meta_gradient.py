"""What every method returns, and how it averages over tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.problem.layout import Params
from imaml_ext.solvers.solution import Solution, Status, counted

Nonfinite = Literal["propagate", "omit"]


@dataclass(frozen=True)
class MetaGradient:
    """The meta-gradient of a batch of B tasks, and how it came about.

    Attributes:
        params: mean over tasks of dL_i/dtheta, tensors of theta's shapes.
        lam: the same for Λ, of lam's form; None where lam is a plain float.
        support_loss, query_loss: at phi, [B].
        adapted: phi, {name: [B, ...]}.
        inner: the inner solve; `residual` is `‖∇G_i(phi_i)‖` and `error_estimate` estimates
            `‖phi_i - phi_i*‖`: delta of the paper's Algorithm 2. The bound needs the curvature of
            G_i itself: there is none with `curvature="ggn"`, whose smallest value is lam or more
            even at a saddle, nor from a method without a linear solve.
        linear: the linear solve; None from a method without one.
        extra: the gradients of whatever else the method learns, by name.
    """

    params: Params
    lam: Any
    support_loss: Tensor
    query_loss: Tensor
    adapted: Params
    inner: Solution
    linear: Solution | None
    extra: Params = field(default_factory=dict)

    def named(self) -> Params:
        """Every gradient by name: parameters under their own, lam under "lam" or "lam.NAME"."""
        if isinstance(self.lam, Mapping):
            strengths = {f"lam.{name}": gradient for name, gradient in self.lam.items()}
        else:
            strengths = {} if self.lam is None else {"lam": self.lam}
        return self.params | strengths | self.extra

    @property
    def failed(self) -> Tensor:
        """Tasks whose losses or solves are not finite, [B] bool."""
        solves = (self.inner,) if self.linear is None else (self.inner, self.linear)
        return failed_tasks(self.query_loss, *solves)

    def describe(self) -> str:
        """Which tasks' solves ended how, and what to do, in one line. Synchronises on CUDA."""
        text = f"Inner solve: {self.inner.describe()}"
        solves = [self.inner]
        if self.linear is not None:
            text += f". Linear solve: {self.linear.describe()}"
            solves.append(self.linear)
        # A task may fail by its query loss alone, where no gradient of it was taken.
        silent = self.failed
        for solve in solves:
            silent = silent & (solve.status != Status.NONFINITE)
        tasks = silent.nonzero()[:, 0].tolist()
        return text + (f". Query loss: NONFINITE: {counted(tasks, len(silent))}" if tasks else "")


@dataclass(frozen=True)
class ImplicitMetaGradient(MetaGradient):
    """A meta-gradient by a linear solve, as `implicit_meta_grad` and `IMAML` give it.

    Attributes:
        params, lam, support_loss, query_loss, adapted, inner, extra: as in `MetaGradient`.
        linear: the linear solve; `error_estimate` estimates `‖x_i - x_i*‖`,
            delta' of Algorithm 2, for the system that was solved, damping included.
    """

    linear: Solution


for _result in (MetaGradient, ImplicitMetaGradient):
    pytree.register_dataclass(_result)


def check_nonfinite(nonfinite: Nonfinite) -> None:
    if nonfinite not in ("propagate", "omit"):
        raise ValueError(f"nonfinite must be 'refuse' or 'skip', got {nonfinite!r}")


def failed_tasks(values: Tensor, *solves: Solution) -> Tensor:
    """Tasks whose value [B] or one of whose solves is not finite, [B] bool."""
    failed = ~values.isfinite()
    for solve in solves:
        failed = failed | (solve.status == Status.NONFINITE)
    return failed


def task_share(ok: Tensor, nonfinite: Nonfinite, dtype: torch.dtype) -> Tensor:
    """What a sum over the tasks that are ok, [B] bool, is multiplied by to be their mean, 0-d.

    With "refuse" NaN if any is not. In theta's dtype: 1 / tasks as a 0-d float32 tensor would round
    a float64 gradient.
    """
    counted = ok.sum().to(dtype)
    if nonfinite == "omit":
        return 1 / counted.clamp_min(1)
    return torch.where(counted == len(ok), 1 / counted, torch.nan)
