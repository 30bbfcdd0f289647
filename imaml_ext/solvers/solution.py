"""What a batched solver returns: a value and, per task, how it went."""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._tracing import may_poll


class Status(IntEnum):
    """How a task's solve ended. The same numbers as in csrc/formulas.h.

    Attributes:
        RUNNING: it has not ended; never so in the report of a meta-gradient.
        CONVERGED: the tolerance was reached.
        MAX_ITER: all steps were taken, or no further one helped; the value is the last iterate.
        NEGATIVE_CURVATURE: a direction with `p'Ap <= 0` was met; the value is the iterate before,
            or the solution without H if it was the first.
        NONFINITE: a loss, gradient or product is NaN or infinite; a linear solve's value is 0.
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_ITER = 2
    NEGATIVE_CURVATURE = 3
    NONFINITE = 4


_REMEDY = {
    Status.MAX_ITER: "stopped before it arrived: judge by residual",
    Status.NEGATIVE_CURVATURE: "H + Λ is not positive definite there: "
    "solve the inner problem further, raise damping or lam, or use curvature='ggn' or MINRES",
    Status.NONFINITE: "a loss, gradient or product is NaN or infinite: "
    "lower the inner learning rate, look at the data of these tasks, or pass nonfinite='omit'",
}


@dataclass(frozen=True)
class Lanczos:
    """The tridiagonal matrix that a Krylov solver builds as it goes, one per task.

    Its eigenvalues, the Ritz values, lie inside the spectrum of the operator: the smallest is an
    upper estimate of the smallest eigenvalue, and the largest a lower one of the largest.

    Attributes:
        diagonal: [max_iter, B] float64.
        link: beside the diagonal, [max_iter - 1, B] float64.
        count: iterations whose curvature was measured, [B].
        scale: each Ritz value is multiplied by it, [B]; None for 1. With a preconditioner M the
            matrix is that of M^-1/2 A M^-1/2, and the scale is the smallest entry of M: only
            `smallest` is then an estimate, and a cautious one.
        shift: added to every Ritz value, to speak of `A + shift I`.
    """

    diagonal: Tensor
    link: Tensor
    count: Tensor
    scale: Tensor | None = None
    shift: float = 0.0

    @staticmethod
    def of_conjugate_gradient(
        curvature: Tensor, beta: Tensor, count: Tensor, scale: Tensor | None
    ) -> "Lanczos":
        """From the coefficients of conjugate gradient.

        Args:
            curvature: `p·Ap / r·r` of each iteration, [max_iter, B] float64.
            beta: `r·r / old r·r` of each, [max_iter, B] float64.
            count, scale: as in `Lanczos`.
        """
        diagonal = curvature.clone()
        diagonal[1:] += beta[:-1] * curvature[:-1]
        return Lanczos(diagonal, beta[:-1].sqrt() * curvature[:-1], count, scale)

    def shifted(self, shift: float) -> "Lanczos":
        """The same of `A + shift I`."""
        return replace(self, shift=self.shift + shift)

    @cached_property
    def ritz(self) -> Tensor:
        """Ritz values, ascending, [B, max_iter]; the unused ones repeat a value inside the range.

        NaN for a task without a measured product. Calls `torch.linalg.eigvalsh`, which synchronises
        on CUDA: that is why it is computed when asked for.
        """
        diagonal, link = self.diagonal.T, self.link.T
        iterations = torch.arange(diagonal.shape[1], device=diagonal.device)
        used = iterations < self.count[:, None]
        linked = iterations[1:] < self.count[:, None]  # k and k + 1 are both used
        diagonal = torch.where(used, diagonal, diagonal[:, :1].nan_to_num())
        link = torch.where(linked, link, 0.0)
        matrix = torch.diag_embed(diagonal) + torch.diag_embed(link, 1) + torch.diag_embed(link, -1)
        values = torch.linalg.eigvalsh(matrix)
        if self.scale is not None:
            values = values * self.scale[:, None]
        return torch.where(self.count[:, None] > 0, values + self.shift, torch.nan)

    @property
    def smallest(self) -> Tensor:
        """The smallest Ritz value, [B] float64: an upper estimate of the smallest eigenvalue."""
        return self.ritz[:, 0]

    @property
    def largest(self) -> Tensor:
        """The largest Ritz value, [B] float64: a lower estimate of the largest eigenvalue."""
        return self.ritz[:, -1]


@dataclass(frozen=True)
class Solution:
    """The result of a batched solve; one entry per task, all on the device.

    Attributes:
        value: [B, D].
        status: `Status`, [B] int32.
        steps: updates made, [B] int32.
        residual: norm of what should be zero at the solution, [B] float64: the recurrence's `|r|`
            for a linear solve (the one before the fallback where curvature was negative at once),
            `‖∇G_i(phi_i)‖` for an inner solve. NaN where the task is NONFINITE.
        lanczos: curvature seen along the solve, of the matrix that `residual` refers to.
        second_moment: running mean of the squared gradients, [B, D], of an inner solver that keeps
            one.
    """

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    lanczos: Lanczos | None = None
    second_moment: Tensor | None = None

    @property
    def error_estimate(self) -> Tensor:
        """`residual / mu`, mu the smallest Ritz value: how far `value` is from the solution, [B].

        An estimate, since mu is at least the smallest eigenvalue. A residual counts as what
        rounding leaves of it, `eps |A| |value|`, at least. Infinite where mu <= 0, since nothing is
        known then; NaN where no product was made. Synchronises on CUDA.

        Raises:
            ValueError: the solver measured no curvature; `lanczos` is None.
        """
        if self.lanczos is None:
            raise ValueError("this solution carries no curvature: there is nothing to bound with")
        mu = self.lanczos.smallest
        rounding = torch.finfo(self.value.dtype).eps * self.lanczos.largest.abs()
        residual = torch.maximum(self.residual, rounding * self.value.norm(dim=1))
        return torch.where(mu <= 0, torch.inf, residual / mu)

    def describe(self) -> str:
        """Which tasks ended how, and what to do about it, in one line. Synchronises on CUDA."""
        status = self.status.tolist()
        parts = []
        for kind in Status:
            tasks = [i for i, s in enumerate(status) if s == kind]
            if tasks:
                remedy = f" ({_REMEDY[kind]})" if kind in _REMEDY else ""
                parts.append(f"{kind.name}: {counted(tasks, len(status))}{remedy}")
        return "; ".join(parts)


def counted(tasks: list[int], total: int) -> str:
    """How many of the tasks, and the first of them by number."""
    shown = ", ".join(map(str, tasks[:8])) + (", ..." if len(tasks) > 8 else "")
    return f"{len(tasks)} of {total} tasks: {shown}"


pytree.register_dataclass(Lanczos)
pytree.register_dataclass(Solution)


def all_done(status: Tensor, step: int) -> bool:
    """Whether no task is RUNNING, as far as that may be read before this step, counted from 0."""
    return may_poll(status, step) and not bool((status == Status.RUNNING).any())
