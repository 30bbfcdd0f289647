"""Hessian-free optimisation of the proximal objective: truncated Newton steps, a line search."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from imaml_ext._checks import check_instance, check_range
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
from imaml_ext.solvers.inner.line_search import Backtracking, rounding_error
from imaml_ext.solvers.linear.base import LinearSolver
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.solution import Solution, Status, all_done


@dataclass(frozen=True)
class HessianFree(InnerSolver):
    """Each step solves `(C_i + Λ + damping_i I) d = -∇G_i` for a direction d by a few iterations of
    CG, and finds its length by a line search on G_i. C is the Gauss-Newton matrix or the Hessian.

    Each task has its own Levenberg-Marquardt damping. It is halved if the full step d reduces G by
    more than 3/4 of the decrease predicted by the quadratic model, and multiplied by 4 if by less
    than 1/4; it does not change if the change of G is below its rounding error. If CG meets
    negative curvature in its first iteration, d is `-Λ^-1 ∇G_i`, and `-∇G_i` without Λ.

    Args:
        steps: maximum number of steps.
        linear: solver for the direction; its `curvature` selects C.
        damping: initial damping.
        line_search: for the length of a step.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.

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
        check_range("damping", self.damping, "[0, inf)")
        check_instance("line_search", self.line_search, Backtracking, "pass Backtracking(...)")
        check_instance("linear", self.linear, LinearSolver, "pass one, such as ConjugateGradient()")
        if getattr(self.linear, "preconditioner", None) == "adam":
            raise ValueError("preconditioner='adam' needs inner=Adam(...), got HessianFree")

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        phi = problem.start()
        status = new_status(problem)
        steps = torch.zeros_like(status)
        damping = torch.full_like(steps, self.damping, dtype=torch.float64)
        for step in range(self.steps):
            at_phi = problem.objective.linearise(phi, self.linear.curvature)
            value, gradient = problem.add_proximal(phi, at_phi.losses, at_phi.gradient)
            norm = row_dot(gradient, gradient).sqrt()
            status = update_status(status, norm, self.tol)
            if all_done(status, step):
                break
            damped = _damped(at_phi.matvec, damping[:, None].to(phi.dtype))
            solved = self.linear.solve(damped, -gradient, problem.lam.values)
            # Without Λ, negative curvature in the first iteration leaves no direction but this.
            no_step = (solved.status == Status.NEGATIVE_CURVATURE) & (solved.steps == 0)
            no_step = no_step & ~problem.lam.values.any()
            direction = torch.where(no_step[:, None], -gradient, solved.value)
            derivative = row_dot(gradient, direction)
            phi, t, at_full = self.line_search.search(
                problem, phi, direction, value, derivative, status == Status.RUNNING
            )
            # CG's residual is orthogonal to d, so d'Ad = -∇G·d: the model decreases by -∇G·d / 2.
            ratio = (value - at_full) / (-0.5 * derivative)
            grown = torch.maximum(4 * damping, -1e-3 * derivative / row_dot(direction, direction))
            adjusted = torch.where(ratio > 0.75, damping / 2, damping)
            adjusted = torch.where(ratio > 0.25, adjusted, grown)  # NaN counts as too small
            changes = derivative.abs() > rounding_error(phi, value)
            damping = torch.where(changes, adjusted, damping)
            steps += t > 0
        return unverified(phi, status, steps)


def _damped(matvec: Matvec, damping: Tensor) -> Matvec:
    return lambda p: matvec(p) + damping * p
