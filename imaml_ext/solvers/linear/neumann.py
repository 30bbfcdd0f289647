"""The Neumann series: the linear solve that truncated back-propagation makes implicitly."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.objective import Matvec
from imaml_ext.solvers.linear.base import (
    LinearSolver,
    System,
    finished,
    initial_status,
    squared_tolerance,
)
from imaml_ext.solvers.solution import Solution, Status, all_done


@dataclass(frozen=True)
class NeumannSeries(LinearSolver):
    """`x = lr (b + (I - lr A) b + ... + (I - lr A)^max_iter-1 b)`, with `A = H + Λ + damping I`.

    It converges where every eigenvalue of A lies in (0, 2 / lr), as gradient descent with that step
    size does, and slower than conjugate gradient: its merit is that K terms at a solution are what
    back-propagation through the last K inner steps of that size computes.

    `value` is x, `residual` is `|b - A x|`: where lr is too large it grows, and says so. A row
    whose curvature `r·Ar` is not positive keeps the sum before it and is NEGATIVE_CURVATURE, or, in
    its first term, `x = Λ^-1 b`. A row that is not finite is NONFINITE with value 0.

    Args:
        max_iter, rtol, atol, damping, curvature: as in `LinearSolver`.
        lr: step size.

    Raises:
        ValueError: a setting is out of range.

    Source: Lorraine, Vicol, Duvenaud 2020, "Optimizing millions of hyperparameters by implicit
    differentiation".
    """

    lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")

    @torch.no_grad()
    def solve(
        self,
        matvec: Matvec,
        b: Tensor,
        lam: float | Tensor = 0.0,
        *,
        second_moment: Tensor | None = None,
    ) -> Solution:
        system = System(matvec, b, lam, self.damping)
        x, r = torch.zeros_like(system.b), system.b.clone()
        rr = row_dot(r, r)
        tol2 = squared_tolerance(system.b, self.rtol, self.atol)
        status = initial_status(rr, tol2)
        steps = torch.zeros_like(status)
        for k in range(self.max_iter):
            if all_done(status, k):
                break
            ar = system.product(r)
            curvature = row_dot(r, ar)
            running = status == Status.RUNNING
            negative = running & (curvature <= 0)
            moves = running & ~negative
            status = torch.where(negative, Status.NEGATIVE_CURVATURE, status)
            x = torch.where(moves[:, None], x + self.lr * r, x)
            r = torch.where(moves[:, None], r - self.lr * ar, r)
            rr = torch.where(moves, row_dot(r, r), rr)
            steps += moves
            status = torch.where(moves & (rr <= tol2), Status.CONVERGED, status)
            status = torch.where(moves & ~rr.isfinite(), Status.NONFINITE, status)
        at_once = (status == Status.NEGATIVE_CURVATURE) & (steps == 0)
        x = torch.where(at_once[:, None], system.without_h(system.b), x)
        return finished(x, status, steps, rr.sqrt())
