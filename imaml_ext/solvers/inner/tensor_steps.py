"""The steps of gradient descent and of Adam in PyTorch, for what the fused kernels cannot do.

Those take the step size as a number, and the direction of the class itself, not of a subclass.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import new_status, unverified, update_status
from imaml_ext.solvers.inner.step_size import StepSize
from imaml_ext.solvers.solution import Solution, Status, all_done

State = tuple[Tensor, ...]  # what a solver keeps from step to step, [B, D] each; () at first


class Stepwise(Protocol):
    """A solver whose step is `phi <- phi - lr * direction`."""

    @property
    def steps(self) -> int: ...

    @property
    def tol(self) -> float | None: ...

    def direction(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """The direction and the new state, from ∇G [B, D] at step 0, 1, ...; differentiable."""


def check_constant_step_size(lr: float | StepSize) -> None:
    """Raises ValueError for a step size that requires grad, where it would get no gradient."""
    if isinstance(lr, StepSize) and lr.learned():
        raise ValueError(
            "lr requires grad, but the implicit gradient does not depend on the step size: call "
            "requires_grad_(False) on the StepSize, or learn it by MAML"
        )


@torch.no_grad()
def solve_in_torch(
    solver: Stepwise, lr: float | StepSize, problem: Proximal
) -> tuple[Solution, State]:
    """As `InnerSolver.solve`, and the state after the last step of each task."""
    check_constant_step_size(lr)
    if isinstance(lr, StepSize):
        lr.check(problem.layout, solver.steps)
    rates: Sequence[float | Tensor]
    rates = lr.rates(solver.steps) if isinstance(lr, StepSize) else [lr] * solver.steps
    phi, state = problem.start(), State()
    status = new_status(problem)
    steps = torch.zeros_like(status)
    for step, rate in enumerate(rates):
        _, gradient = problem.objective_at(step).gradient(phi)
        if solver.tol is not None:
            status = update_status(status, problem.residual(phi, gradient), solver.tol)
            if all_done(status, step):
                break
        gradient = gradient + problem.lam.mv(phi - problem.theta)
        direction, moved = solver.direction(gradient, state, step)
        running = (status == Status.RUNNING)[:, None]
        before = state or tuple(torch.zeros_like(each) for each in moved)
        state = tuple(torch.where(running, *pair) for pair in zip(moved, before, strict=True))
        phi = torch.where(running, phi - rate * direction, phi)
        steps += running[:, 0]
    return unverified(phi, status, steps), state
