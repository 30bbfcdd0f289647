"""The Neumann series: the linear solve implicit in truncated back-propagation."""

from dataclasses import dataclass

import torch

from imaml_ext._checks import check_range
from imaml_ext.ops.rows import row_dot
from imaml_ext.solvers.linear.base import (
    LinearSolver,
    LinearSystem,
    initial_status,
    squared_tolerance,
    with_true_residual,
)
from imaml_ext.solvers.solution import Lanczos, Solution, Status, all_done


@dataclass(frozen=True)
class NeumannSeries(LinearSolver):
    """`x = lr (b + (I - lr A) b + ... + (I - lr A)^max_iter-1 b)`, with `A = H + Λ + damping I`.

    It converges if every eigenvalue of A lies in (0, 2 / lr), like gradient descent with that step
    size, and more slowly than conjugate gradient. At a minimum of the inner objective, K terms
    equal back-propagation through the last K inner steps of that size.

    `value` is x and `residual` is `|b - A x|`, as in `LinearSolver`, which grows if lr is too
    large. `lanczos` has the smallest and the largest `r·Ar / r·r`; the former tends to the smallest
    eigenvalue. A row whose curvature `r·Ar` is not positive is NEGATIVE_CURVATURE and keeps the
    previous sum; in the first term, `x = Λ^-1 b`.

    Args:
        max_iter, rtol, atol, damping, curvature: as in `LinearSolver`.
        lr: step size.

    Raises:
        TypeError, ValueError: as in `LinearSolver`.

    Source: Lorraine, Vicol, Duvenaud 2020, "Optimizing millions of hyperparameters by implicit
    differentiation".
    """

    _completes_status = True

    lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lr", self.lr, "(0, inf)")

    def _solve(self, system: LinearSystem) -> Solution:
        x, r = torch.zeros_like(system.b), system.b.clone()
        rr = row_dot(r, r)
        norm = rr.sqrt()
        tol2 = squared_tolerance(system, rr, self.rtol, self.atol)
        status = initial_status(rr, tol2)
        steps = torch.zeros_like(status)
        least, most = torch.full_like(rr, torch.inf), torch.full_like(rr, -torch.inf)
        for k in range(self.max_iter):
            if all_done(status, k):
                break
            ar = system.product(r)
            curvature = row_dot(r, ar)
            running = status == Status.RUNNING
            rayleigh = curvature / rr
            least = torch.where(running, torch.minimum(least, rayleigh), least)
            most = torch.where(running, torch.maximum(most, rayleigh), most)
            negative = running & (curvature <= 0)
            moves = running & ~negative
            status = status.masked_fill(negative, Status.NEGATIVE_CURVATURE)
            x = torch.where(moves[:, None], x + self.lr * r, x)
            r = torch.where(moves[:, None], r - self.lr * ar, r)
            rr = torch.where(moves, row_dot(r, r), rr)
            steps += moves
            status = status.masked_fill(moves & (rr <= tol2), Status.CONVERGED)
            status = status.masked_fill(moves & ~rr.isfinite(), Status.NONFINITE)
        at_once = (status == Status.NEGATIVE_CURVATURE) & (steps == 0)
        x = torch.where(at_once[:, None], system.lam.solve(system.b), x)
        count = 2 * least.isfinite().to(torch.int32)
        lanczos = Lanczos(torch.stack([least, most]), least.new_zeros(1, len(least)), count)
        solution = Solution(x, status, steps, rr.sqrt(), lanczos)
        # |A| is at most 2 / lr, or the series diverges.
        total = x if system.x0 is None else x.abs() + system.x0.abs()
        drift = 20 * torch.finfo(x.dtype).eps / self.lr * row_dot(total, total).sqrt()
        return with_true_residual(system, solution, norm, self.rtol, self.atol, drift)
