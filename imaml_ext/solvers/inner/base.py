"""What every inner solver shares."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imaml_ext._checks import check_integer
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.solution import Solution, Status


class InnerSolver(ABC):
    """Solves the inner problems of a batch from `phi = theta`.

    The implicit gradient needs only phi, not how it was found, so a solver is free in what it does.

    Attributes:
        tol: a task has arrived when `‖∇G_i‖ <= tol`: delta of the paper's Algorithm 2. None: it
            never has, and takes all steps.
    """

    tol: float | None = None

    @abstractmethod
    def solve(self, problem: Proximal) -> Solution:
        """Adapt the problem's tasks.

        On an accelerator a solve of more than 64 steps waits for the device every 64, to see if all
        tasks are done; not while it is recorded.

        Args:
            problem: G_i of every task.

        Returns:
            `value` is phi [B, D]. A task that is still RUNNING is judged by whoever computes the
            gradient at phi, and so is `residual`, which may be NaN here.
        """


def update_status(status: Tensor, residual: Tensor, tol: float | None) -> Tensor:
    """RUNNING tasks become CONVERGED where `residual <= tol`; any is NONFINITE where it is not."""
    if tol is not None:
        arrived = (status == Status.RUNNING) & (residual <= tol)
        status = torch.where(arrived, Status.CONVERGED, status)
    return torch.where(residual.isfinite(), status, Status.NONFINITE).to(torch.int32)


def unverified(phi: Tensor, status: Tensor, steps: Tensor) -> Solution:
    """A solution whose residual has not been measured at its last step."""
    return Solution(phi, status, steps, torch.full_like(steps, torch.nan, dtype=torch.float64))


def new_status(problem: Proximal) -> Tensor:
    return torch.zeros(problem.tasks, dtype=torch.int32, device=problem.theta.device)


def check_settings(*, lr: float = 1.0, steps: int, tol: float | None) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    check_integer("steps", steps)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
