"""Hessian-free optimisation of the proximal objective: truncated Newton steps, a line search."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.objective import Matvec
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import (
    InnerSolver,
    check_settings,
    new_status,
    unverified,
    update_status,
)
from imaml_ext.solvers.inner.line_search import Backtracking, rounding_of
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.solution import Solution, Status, all_done


@dataclass(frozen=True)
class HessianFree(InnerSolver):
    """Each step: a direction d from `(C_i + Λ + damping_i I) d = -∇G_i` by a few CG products, and a
    length from a line search on G_i. C is the Gauss-Newton matrix or the Hessian of the loss.

    Damping is Levenberg and Marquardt's, for each task: it is halved where the full step d lowers
    G by more than 3/4 of what the quadratic model foretold, and grows fourfold where by less than
    1/4; it stays where G changes by less than its own rounding. Where d meets negative curvature at
    once, it is the gradient, scaled by Λ^-1.

    Args:
        steps: steps at most.
        linear: for the direction; its `curvature` says what C is.
        damping: to begin with.
        line_search: for the length.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.

    Raises:
        ValueError: a setting is out of range.

    Source: Martens 2010, "Deep learning via Hessian-free optimization".
    """

    steps: int = 3
    linear: ConjugateGradient = field(
        default_factory=lambda: ConjugateGradient(max_iter=5, curvature="ggn")
    )
    damping: float = 1.0
    line_search: Backtracking = field(default_factory=Backtracking)
    tol: float | None = None

    def __post_init__(self) -> None:
        check_settings(steps=self.steps, tol=self.tol)
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be finite and not negative, got {self.damping}")

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        phi = problem.start()
        status = new_status(problem)
        steps = torch.zeros_like(status)
        damping = torch.full_like(steps, self.damping, dtype=torch.float64)
        for step in range(self.steps):
            at_phi = problem.objective.linearise(phi, self.linear.curvature)
            value, gradient = problem.complete(phi, at_phi.losses, at_phi.gradient)
            norm = row_dot(gradient, gradient).sqrt()
            status = update_status(status, norm, self.tol)
            if all_done(status, step):
                break
            damped = _damped(at_phi.matvec, damping[:, None].to(phi.dtype))
            direction = self.linear.solve(damped, -gradient, problem.lam).value
            slope = row_dot(gradient, direction)
            phi, t, at_full = self.line_search.search(
                problem, phi, direction, value, slope, status == Status.RUNNING
            )
            # CG's residual is orthogonal to d, so d'Ad = -∇G·d, and the model falls by -∇G·d / 2.
            ratio = (value - at_full) / (-0.5 * slope)
            grown = torch.maximum(4 * damping, -1e-3 * slope / row_dot(direction, direction))
            adjusted = torch.where(ratio > 0.75, damping / 2, damping)
            adjusted = torch.where(ratio > 0.25, adjusted, grown)  # where it is NaN too
            damping = torch.where(slope.abs() > rounding_of(phi, value), adjusted, damping)
            steps += t > 0
        return unverified(phi, status, steps)


def _damped(matvec: Matvec, damping: Tensor) -> Matvec:
    return lambda p: matvec(p) + damping * p
