"""Inner solvers: `phi_i = argmin L_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, called `G_i`."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.objective import Objective
from imaml_ext.ops import prox_gd_, prox_norms
from imaml_ext.solution import Solution, Status


class InnerSolver(ABC):
    """Solves the inner problems of a batch from `phi = theta`.

    The implicit gradient needs only phi, not how it was found, so a solver is free in what it does.
    """

    tol: float | None = None

    @abstractmethod
    def solve(self, objective: Objective, theta: Tensor, lam: Tensor) -> Solution:
        """Adapt the objective's tasks from theta [D] under Λ, [1] or [D].

        Returns:
            `value` is phi [B, D]. A task that is still RUNNING is judged by whoever computes the
            gradient at phi, and so is `residual`, which is NaN here.
        """


@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    """`phi <- phi - lr ∇G_i(phi)`, all tasks at once, with momentum as in `torch.optim.SGD`.

    Args:
        lr: step size.
        steps: steps at most.
        momentum, nesterov: of the heavy ball, or of Nesterov.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.
    """

    lr: float = 0.1
    steps: int = 16
    momentum: float = 0.0
    nesterov: bool = False
    tol: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a positive momentum")
        if self.tol is not None and not self.tol >= 0:
            raise ValueError(f"tol must not be negative, got {self.tol}")

    @torch.no_grad()
    def solve(self, objective: Objective, theta: Tensor, lam: Tensor) -> Solution:
        phi = theta.expand(objective.tasks, -1).clone()
        velocity = torch.zeros_like(phi) if self.momentum else None
        status = torch.zeros(objective.tasks, dtype=torch.int32, device=phi.device)
        steps = torch.zeros_like(status)
        for _ in range(self.steps):
            _, grad = objective.gradient(phi)
            if self.tol is not None:
                norm2, _ = prox_norms(phi, grad, theta, lam)
                status = judge(status, norm2.sqrt(), self.tol)
                if phi.device.type == "cpu" and not (status == Status.RUNNING).any():
                    break
            prox_gd_(
                phi, grad, theta, lam, lr=self.lr, velocity=velocity, momentum=self.momentum,
                nesterov=self.nesterov, status=status,
            )  # fmt: skip
            steps += status == Status.RUNNING
        residual = torch.full_like(status, torch.nan, dtype=torch.float64)
        return Solution(phi, status, steps, residual)


def judge(status: Tensor, residual: Tensor, tol: float | None) -> Tensor:
    """RUNNING tasks become CONVERGED where `residual <= tol`; any is NONFINITE where it is not."""
    if tol is not None:
        arrived = (status == Status.RUNNING) & (residual <= tol)
        status = torch.where(arrived, Status.CONVERGED, status)
    return torch.where(residual.isfinite(), status, Status.NONFINITE).to(torch.int32)
