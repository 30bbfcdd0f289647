"""Adam on the proximal objective."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
from imaml_ext.solvers.inner.step_size import StepSize
from imaml_ext.solvers.inner.tensor_steps import State, solve_in_torch
from imaml_ext.solvers.solution import Solution, Status, all_done


@dataclass(frozen=True)
class Adam(InnerSolver):
    """Adam on G_i, each task with its own moments, as `torch.optim.Adam`.

    The solution's `second_moment` is the bias-corrected one of the last step, as needed by
    `ConjugateGradient(preconditioner="adam")`.

    The unrolled methods differentiate its steps. For entries g of ∇G_i that are large compared with
    eps, the first step is nearly `lr sign(g)`. Its derivative with respect to g is largest at
    g = 0, where it is `lr / eps`: for unrolled methods, choose an eps such as 1e-3. The derivative
    of the square root of a second moment of exactly 0 is taken to be 0, so derivatives are finite
    without an `eps_root` as in TorchOpt.

    Args:
        lr: step size; or a `StepSize`, whose steps are computed by PyTorch's operators.
        steps: maximum number of steps.
        betas, eps: as in `torch.optim.Adam`; eps is added to the square root.
        tol: a task stops when `‖∇G_i‖ <= tol`; None: all take `steps` steps.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.

    Source: Kingma, Ba 2015.
    """

    lr: float | StepSize = 1e-2
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

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """The direction of a step and the moments, from ∇G [B, D]; differentiable."""
        beta1, beta2 = self.betas
        first, second = (1 - beta1) * gradient, (1 - beta2) * gradient * gradient
        if state:
            first, second = beta1 * state[0] + first, beta2 * state[1] + second
        corrected = second / (1 - beta2 ** (step + 1))
        # Not sqrt(0), whose derivative is infinite.
        root = torch.where(corrected > 0, corrected, 1.0).sqrt()
        root = torch.where(corrected > 0, root, corrected)
        return first / (1 - beta1 ** (step + 1)) / (root + self.eps), (first, second)

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        check_tol(problem, self.tol)
        if type(self).direction is not Adam.direction:
            return solve_in_torch(self, self.lr, problem)[0]  # with any state
        if isinstance(self.lr, StepSize):
            solution, state = solve_in_torch(self, self.lr, problem)
            second = state[1] if state else torch.zeros_like(solution.value)
            return self._with_second_moment(solution, second)
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
        return self._with_second_moment(unverified(phi, status, steps), second)

    def _with_second_moment(self, solution: Solution, second: Tensor) -> Solution:
        steps = solution.steps.double()
        correction = (1 - self.betas[1] ** steps).clamp_min(1 - self.betas[1])
        return replace(solution, second_moment=second / correction[:, None].to(second.dtype))
