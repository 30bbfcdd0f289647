"""Adam on the proximal objective."""

from dataclasses import dataclass, replace

import torch

from imaml_ext._checks import check_range
from imaml_ext.ops.rows import prox_adam_
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import (
    InnerSolver,
    check_settings,
    check_tol,
    new_status,
    unverified,
    update_status,
)
from imaml_ext.solvers.solution import Solution, Status, all_done


@dataclass(frozen=True)
class Adam(InnerSolver):
    """Adam on G_i, each task with its own moments, as `torch.optim.Adam`.

    The solution's `second_moment` is the bias-corrected one of the last step, as needed by
    `ConjugateGradient(preconditioner="adam")`.

    Args:
        lr: step size.
        steps: maximum number of steps.
        betas, eps: as in `torch.optim.Adam`.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.

    Source: Kingma, Ba 2015.
    """

    lr: float = 1e-2
    steps: int = 16
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    tol: float | None = None
    takes_mini_batches = True

    def __post_init__(self) -> None:
        check_settings(lr=self.lr, steps=self.steps, tol=self.tol)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            check_range("each of betas", beta, "[0, 1)")
        check_range("eps", self.eps, "[0, inf]")

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        check_tol(problem, self.tol)
        phi = problem.start()
        first, second = torch.zeros_like(phi), torch.zeros_like(phi)
        status = new_status(problem)
        steps = torch.zeros_like(status)
        for step in range(1, self.steps + 1):
            _, gradient = problem.objective_at(step - 1).gradient(phi)
            if self.tol is not None:
                status = update_status(status, problem.residual(phi, gradient), self.tol)
                if all_done(status, step - 1):
                    break
            prox_adam_(
                phi, problem.unfused(phi, gradient), problem.theta, problem.lam.fused, lr=self.lr,
                first_moment=first, second_moment=second, beta1=self.betas[0],
                beta2=self.betas[1], eps=self.eps, step=step, status=status,
            )  # fmt: skip
            steps += status == Status.RUNNING
        correction = (1 - self.betas[1] ** steps.double()).clamp_min(1 - self.betas[1])
        second = second / correction[:, None].to(second.dtype)
        return replace(unverified(phi, status, steps), second_moment=second)
