"""Limited-memory BFGS on the proximal objective."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imaml_ext._checks import check_instance, check_integer
from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import (
    InnerSolver,
    check_settings,
    new_status,
    unverified,
    update_status,
)
from imaml_ext.solvers.inner.line_search import Backtracking
from imaml_ext.solvers.solution import Solution, Status, all_done

Pair = tuple[Tensor, Tensor, Tensor]  # s, y [B, D], and rho = 1 / s·y [B], 0 for an unused pair


@dataclass(frozen=True)
class LBFGS(InnerSolver):
    """L-BFGS with a backtracking line search, each task with its own history.

    A step whose curvature `s·y` is not positive is not stored in its task's history. If a line
    search fails, its task clears its history, then scales its steps down, and stops as MAX_ITER
    when they vanish.

    Args:
        steps: maximum number of steps.
        history: number of stored pairs; each takes 2 B D scalars.
        line_search: for the length of a step.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.

    Source: Nocedal 1980, "Updating quasi-Newton matrices with limited storage".
    """

    steps: int = 16
    history: int = 8
    line_search: Backtracking = field(default_factory=Backtracking)
    tol: float | None = None

    def __post_init__(self) -> None:
        check_settings(steps=self.steps, tol=self.tol)
        check_integer("history", self.history, minimum=1)
        check_instance("line_search", self.line_search, Backtracking, "pass Backtracking(...)")

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        phi = problem.start()
        status = new_status(problem)
        steps = torch.zeros_like(status)
        pairs: deque[Pair] = deque(maxlen=self.history)  # the newest last
        value, gradient = problem.value_and_gradient(phi)
        gamma = _first_scale(gradient)
        shortest = self.line_search.shrink**self.line_search.trials
        remembers = torch.zeros_like(status, dtype=torch.bool)
        for step in range(self.steps):
            status = update_status(status, row_dot(gradient, gradient).sqrt(), self.tol)
            if all_done(status, step):
                break
            direction = -_two_loops(gradient, pairs, gamma)
            derivative = row_dot(gradient, direction)
            moved, t, _ = self.line_search.search(
                problem, phi, direction, value, derivative, status == Status.RUNNING
            )
            steps += t > 0
            stuck = (status == Status.RUNNING) & (t == 0)
            first = _first_scale(gradient)
            gamma = torch.where(stuck, torch.where(remembers, first, gamma * shortest), gamma)
            vanished = gamma < torch.finfo(phi.dtype).eps * first
            status = status.masked_fill(stuck & vanished, Status.MAX_ITER)
            remembers = remembers & ~stuck
            for *_, rho in pairs:
                rho.masked_fill_(stuck, 0.0)
            if step + 1 == self.steps:
                phi = moved
                break
            value, new_gradient = problem.value_and_gradient(moved)
            s, y = moved - phi, new_gradient - gradient
            sy, yy = row_dot(s, y), row_dot(y, y)
            curved = sy > torch.finfo(phi.dtype).eps * (row_dot(s, s) * yy).sqrt()
            rho = torch.where(curved, 1 / sy, 0.0)
            gamma = torch.where(curved, sy / yy, gamma)
            pairs.append((s, y, rho))
            remembers = remembers | curved
            phi, gradient = moved, new_gradient
        return unverified(phi, status, steps)


def _first_scale(gradient: Tensor) -> Tensor:
    """Scale of a step while the history is empty: its length is at most 1."""
    return 1 / row_dot(gradient, gradient).sqrt().clamp_min(1.0)


def _two_loops(gradient: Tensor, pairs: Sequence[Pair], gamma: Tensor) -> Tensor:
    """The estimate of the inverse Hessian times the gradient."""

    def column(factor: Tensor) -> Tensor:
        return factor[:, None].to(gradient.dtype)

    q = gradient
    alphas = []
    for s, y, rho in reversed(pairs):
        alpha = rho * row_dot(s, q)
        q = q - column(alpha) * y
        alphas.append(alpha)
    q = column(gamma) * q
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + column(alpha - rho * row_dot(y, q)) * s
    return q
