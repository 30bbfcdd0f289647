"""Gradient descent on the proximal objective, plain, with momentum, or accelerated."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext._checks import check_choice, check_range
from imaml_ext.ops.rows import prox_gd_
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import (
    InnerSolver,
    check_settings,
    check_tol,
    new_status,
    unverified,
    update_status,
)
from imaml_ext.solvers.inner.step_size import StepSize
from imaml_ext.solvers.inner.tensor_steps import State, solve_in_torch
from imaml_ext.solvers.solution import Solution, Status, all_done


@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    """`phi <- phi - lr ∇G_i(phi)`, optionally with momentum, for all tasks at once.

    Args:
        lr: step size; or a `StepSize`, whose steps are computed by PyTorch's operators.
        steps: maximum number of steps.
        momentum, nesterov: as in `torch.optim.SGD`.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.
    """

    lr: float | StepSize = 0.1
    steps: int = 16
    momentum: float = 0.0
    nesterov: bool = False
    tol: float | None = None
    takes_mini_batches = True

    def __post_init__(self) -> None:
        check_settings(lr=self.lr, steps=self.steps, tol=self.tol)
        check_range("momentum", self.momentum, "[0, 1)")
        check_choice("nesterov", self.nesterov, (False, True))
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a positive momentum")

    @staticmethod
    def accelerated(
        *, lr: float, steps: int, strong_convexity: float, tol: float | None = None
    ) -> "GradientDescent":
        """Nesterov's accelerated method for a strongly convex G.

        Args:
            lr: `1 / L`, where L is the largest curvature of G.
            steps, tol: as in `GradientDescent`.
            strong_convexity: mu, the smallest curvature of G; lam if the loss is convex. The
                momentum is `(1 - sqrt(lr mu)) / (1 + sqrt(lr mu))`.

        Raises:
            TypeError, ValueError: `lr mu` is not in (0, 1), or as in `GradientDescent`.

        Source: Nesterov 2004, "Introductory lectures on convex optimization", scheme 2.2.11.
        """
        check_range("lr", lr, "(0, inf)")
        check_range("strong_convexity", strong_convexity, "(0, inf)")
        root = math.sqrt(lr * strong_convexity)
        if not 0 < root < 1:
            raise ValueError(
                f"lr * strong_convexity must be in (0, 1), got {lr} and {strong_convexity}: "
                "set lr to 1 / the largest curvature"
            )
        momentum = (1 - root) / (1 + root)
        return GradientDescent(lr, steps, momentum=momentum, nesterov=True, tol=tol)

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """The direction of a step and the velocity, from ∇G [B, D]; differentiable."""
        if not self.momentum:
            return gradient, ()
        velocity = self.momentum * state[0] + gradient if state else gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return direction, (velocity,)

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        check_tol(problem, self.tol)
        if isinstance(self.lr, StepSize) or type(self).direction is not GradientDescent.direction:
            return solve_in_torch(self, self.lr, problem)[0]
        phi = problem.start()
        velocity = torch.zeros_like(phi) if self.momentum else None
        settings: Any = {
            "lr": self.lr, "velocity": velocity, "momentum": self.momentum,
            "nesterov": self.nesterov,
        }  # fmt: skip
        status = new_status(problem)
        steps = torch.zeros_like(status)
        if self.tol is None and problem.descend(phi, steps=self.steps, **settings):
            return unverified(phi, status, steps + self.steps)
        for step in range(self.steps):
            _, gradient = problem.objective_at(step).gradient(phi)
            if self.tol is not None:
                status = update_status(status, problem.residual(phi, gradient), self.tol)
                if all_done(status, step):
                    break
            gradient = problem.unfused(phi, gradient)
            prox_gd_(phi, gradient, problem.theta, problem.lam.fused, status=status, **settings)
            if self.tol is not None:
                steps += status == Status.RUNNING
        if self.tol is None:
            steps += self.steps
        return unverified(phi, status, steps)
