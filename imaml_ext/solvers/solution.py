"""The result of a batched solver: a value, and a report for each task."""

from collections.abc import Container
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_instance
from imaml_ext._tracing import may_poll, may_read_values


class Status(IntEnum):
    """How a task's solve ended. The same numbers as in csrc/formulas.h.

    Attributes:
        RUNNING: not finished; never in the report of a meta-gradient.
        CONVERGED: the tolerance was reached; by a linear solve, within the factor of 2 described in
            `LinearSolver`.
        MAX_ITER: all steps were taken, or no further progress was possible; the value is the last
            iterate.
        NEGATIVE_CURVATURE: a direction with `p'Ap <= 0` was found, or A is singular in this
            precision; the value is the previous iterate, or, with 0 steps, the solution without H.
        NONFINITE: a loss, gradient or product is NaN or infinite; a linear solve's value is 0.
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_ITER = 2
    NEGATIVE_CURVATURE = 3
    NONFINITE = 4


_REMEDY = {
    Status.MAX_ITER: "not converged: check residual",
    Status.NEGATIVE_CURVATURE: "H + Λ is not positive definite: "
    "take more inner steps, raise damping or lam, or use curvature='ggn' or MINRES",
    Status.NONFINITE: "a loss, gradient or product is NaN or infinite: "
    "lower the inner learning rate, check the data of these tasks, or pass nonfinite='omit'",
}


@dataclass(frozen=True)
class Lanczos:
    """The tridiagonal matrix that a Krylov solver computes along the way, one per task.

    Its eigenvalues, the Ritz values, lie inside the spectrum of the operator: the smallest is an
    upper bound of the smallest eigenvalue, the largest a lower bound of the largest.

    Attributes:
        diagonal: [max_iter, B] float64.
        link: the off-diagonal, [max_iter - 1, B] float64.
        count: number of iterations whose curvature was measured, [B].
        scale: factor of each Ritz value, [B]; None for 1. With a preconditioner M the matrix is
            that of M^-1/2 A M^-1/2, and the scale is the smallest entry of M: then `largest` is not
            an estimate, and `smallest` a conservative one.
        shift: added to every Ritz value, for those of `A + shift I`.
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
        """The matrix from the coefficients of conjugate gradient.

        Args:
            curvature: `p·Ap / r·r` of each iteration, [max_iter, B] float64.
            beta: `r·r / old r·r` of each iteration, [max_iter, B] float64.
            count, scale: as in `Lanczos`.
        """
        diagonal = curvature.clone()
        diagonal[1:] += beta[:-1] * curvature[:-1]
        return Lanczos(diagonal, beta[:-1].sqrt() * curvature[:-1], count, scale)

    def shifted(self, shift: float) -> "Lanczos":
        """That of `A + shift I`."""
        return replace(self, shift=self.shift + shift)

    @cached_property
    def ritz(self) -> Tensor:
        """Ritz values, ascending, [B, max_iter]; unused entries repeat a value inside the range.

        NaN for a task without a measured product. Computed on first access, by
        `torch.linalg.eigvalsh`, which synchronises on CUDA.
        """
        diagonal, link = self.diagonal.T, self.link.T
        iterations = torch.arange(diagonal.shape[1], device=diagonal.device)
        used = iterations < self.count[:, None]
        linked = iterations[1:] < self.count[:, None]  # both k and k + 1 are used
        diagonal = torch.where(used, diagonal, diagonal[:, :1].nan_to_num())
        link = torch.where(linked, link, 0.0)
        matrix = torch.diag_embed(diagonal) + torch.diag_embed(link, 1) + torch.diag_embed(link, -1)
        values = torch.linalg.eigvalsh(matrix)
        if self.scale is not None:
            values = values * self.scale[:, None]
        return torch.where(self.count[:, None] > 0, values + self.shift, torch.nan)

    @property
    def smallest(self) -> Tensor:
        """The smallest Ritz value, [B] float64: an upper bound of the smallest eigenvalue."""
        return self.ritz[:, 0]

    @property
    def largest(self) -> Tensor:
        """The largest Ritz value, [B] float64: a lower bound of the largest eigenvalue."""
        return self.ritz[:, -1]


@dataclass(frozen=True)
class Solution:
    """The result of a batched solve; one entry per task, all on the device.

    Attributes:
        value: [B, D].
        status: `Status`, [B] int32.
        steps: number of updates, [B] int32.
        residual: norm of the residual, [B] float64: of a linear solve the recurrence's `|r|`, or
            `|b - A x|` or a bound of it where the recurrence may have drifted (of the solution
            without H, that before the solve); `‖∇G_i(phi_i)‖` of an inner solve. NaN where the task
            is NONFINITE.
        lanczos: curvature measured in the solve, of the matrix that `residual` refers to.
        second_moment: running mean of the squared gradients, [B, D], if the inner solver keeps one.
    """

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    lanczos: Lanczos | None = None
    second_moment: Tensor | None = None

    @property
    def error_estimate(self) -> Tensor:
        """`residual / mu`, mu the smallest Ritz value: distance of `value` from the solution, [B].

        An estimate, not a bound, since mu is at least the smallest eigenvalue. The residual is
        taken to be at least its rounding error, `eps |A| |value|`. Infinite where mu <= 0; NaN
        where no product was computed. Synchronises on CUDA.

        Raises:
            ValueError: the solver measured no curvature; `lanczos` is None.
        """
        if self.lanczos is None:
            raise ValueError(
                "no error estimate: the linear solver measured no curvature; your own can "
                "return it in Solution(..., lanczos=...)"
            )
        mu = self.lanczos.smallest
        rounding = torch.finfo(self.value.dtype).eps * self.lanczos.largest.abs()
        residual = torch.maximum(self.residual, rounding * self.value.norm(dim=1))
        return torch.where(mu <= 0, torch.inf, residual / mu)

    def describe(self, explained: Container[int] = ()) -> str:
        """The tasks with each status, and remedies, in one line. Synchronises on CUDA.

        Args:
            explained: statuses without a remedy in the text.
        """
        status = self.status.tolist()
        parts = []
        for kind in Status:
            tasks = [i for i, s in enumerate(status) if s == kind]
            if tasks:
                remedy = "" if kind in explained else _REMEDY.get(kind, "")
                remedy = f" ({remedy})" if remedy else ""
                parts.append(f"{kind.name}: {counted(tasks, len(status))}{remedy}")
        return "; ".join(parts)


def counted(tasks: list[int], total: int) -> str:
    """A text such as "2 of 16 tasks: 3, 7", with at most 8 tasks listed."""
    shown = ", ".join(map(str, tasks[:8])) + (", ..." if len(tasks) > 8 else "")
    return f"{len(tasks)} of {total} tasks: {shown}"


def checked_solution(solver: object, solution: Solution, rows: Tensor) -> Solution:
    """What a solver returned, its value detached and contiguous.

    Args:
        solver: named in errors.
        solution: of any type.
        rows: [B, D], like the value that is expected.

    Raises:
        TypeError: it is not a `Solution`, or a field is not a tensor of the expected kind.
        ValueError: a field has another shape, dtype or device, or a status is not a `Status`.
    """
    name = type(solver).__name__
    remedy = "return Solution(value, status, steps, residual)"
    check_instance(f"the result of {name}", solution, Solution, remedy)
    shape, dtype, device = rows.shape, rows.dtype, rows.device
    fields = {
        "value": (shape, dtype),
        "status": (shape[:1], torch.int32),
        "steps": (shape[:1], torch.int32),
        "residual": (shape[:1], torch.float64),
    }
    if solution.second_moment is not None:
        fields["second_moment"] = (shape, dtype)
    if solution.lanczos is not None:
        check_instance(f"{name}: lanczos", solution.lanczos, Lanczos, "or return None")
    for field, (wanted, kind) in fields.items():
        given = getattr(solution, field)
        check_instance(f"{name}: {field}", given, Tensor, f"return a {kind} tensor")
        if given.shape != wanted or given.dtype != kind or given.device != device:
            raise ValueError(
                f"{name}: {field} must be {list(wanted)} {kind} on {device}, got "
                f"{list(given.shape)} {given.dtype} on {given.device}"
            )
    status, value = solution.status, solution.value
    if may_read_values(status):
        unknown = [number for number in status.tolist() if not 0 <= number < len(Status)]
        if unknown:
            raise ValueError(f"{name}: status must contain values of Status, got {unknown[0]}")
    if value.requires_grad or not value.is_contiguous():
        return replace(solution, value=value.detach().contiguous())
    return solution


pytree.register_dataclass(Lanczos)
pytree.register_dataclass(Solution)


def all_done(status: Tensor, step: int) -> bool:
    """Whether no task is RUNNING; False if the status may not be read at this step (from 0)."""
    return may_poll(status, step) and not bool((status == Status.RUNNING).any())
