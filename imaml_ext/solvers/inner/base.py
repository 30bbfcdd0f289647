"""The interface of inner solvers, and their common helpers."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imaml_ext._checks import check_integer, check_range
from imaml_ext.ops.rows import is_not_finite
from imaml_ext.problem.batch import versions
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.step_size import StepSize
from imaml_ext.solvers.solution import Solution, Status, checked_solution


class InnerSolver(ABC):
    """Solves the inner problems of a batch.

    The implicit gradient depends only on phi, so a solver may compute it in any way;
    docs/external-solver.md has a complete example.

    Attributes:
        tol: a task has converged when `‖∇G_i‖ <= tol` (delta of the paper's Algorithm 2). None:
            every task takes all steps.
        takes_mini_batches: whether `solve` uses the mini-batch of each step,
            `problem.objective_at(step)`. If not, mini-batches are refused.
    """

    tol: float | None = None
    takes_mini_batches: bool = False

    @abstractmethod
    def solve(self, problem: Proximal) -> Solution:
        """Adapt the problem's tasks, starting from `problem.start()`. Called in grad mode.

        The built-in solvers of more than 64 steps synchronise every 64 on an accelerator, to stop
        when all tasks are done; never while being recorded.

        Args:
            problem: G_i of every task; its tensors must not be modified.

        Returns:
            `value` is phi [B, D]. The caller measures `residual` at phi, so NaN may be returned,
            and sets the final status. A RUNNING task becomes CONVERGED if `residual <= tol`,
            otherwise MAX_ITER, and a CONVERGED one MAX_ITER if `residual > 2 tol`.
        """


def solve_inner(inner: InnerSolver, problem: Proximal) -> Solution:
    """`inner.solve(problem)`.

    Raises:
        TypeError, ValueError: the solver needs all examples in each step, but there are
            mini-batches; or it does not return a valid solution.
        RuntimeError: it modified theta or Λ.
    """
    name = type(inner).__name__
    if problem.batches is not None and not inner.takes_mini_batches:
        raise ValueError(
            f"{name} does not take mini-batches: pass the support set itself, or use "
            "GradientDescent, Adam, External(fn, takes_mini_batches=True), or a class of your own "
            "with takes_mini_batches = True"
        )
    names, constants = ("theta", "lam.values"), (problem.theta, problem.lam.values)
    before = versions(constants)
    with torch.enable_grad():  # it may use autograd itself
        solution = inner.solve(problem)
    for field, old, new in zip(names, before, versions(constants), strict=True):
        if old != new:
            raise RuntimeError(
                f"{name} modified problem.{field} in place: clone it before modifying it"
            )
    return checked_solution(inner, solution, problem.theta.expand(problem.tasks, -1))


def update_status(status: Tensor, residual: Tensor, tol: float | None) -> Tensor:
    """RUNNING tasks become CONVERGED if `residual <= tol`.

    Any task becomes NONFINITE if its residual is not finite.
    """
    if tol is not None:
        converged = (status == Status.RUNNING) & (residual <= tol)
        status = status.masked_fill(converged, Status.CONVERGED)
    return status.to(torch.int32).masked_fill(is_not_finite(residual), Status.NONFINITE)


def final_status(status: Tensor, residual: Tensor, tol: float | None) -> Tensor:
    """The statuses of a finished solve, from the residuals at its solution."""
    status = update_status(status, residual, tol)
    failed = status == Status.RUNNING
    if tol is not None:
        failed |= (status == Status.CONVERGED) & (residual > 2 * tol)
    return status.masked_fill(failed, Status.MAX_ITER)


def unverified(phi: Tensor, status: Tensor, steps: Tensor) -> Solution:
    """A solution whose residual at phi has not been computed."""
    return Solution(phi, status, steps, torch.full_like(steps, torch.nan, dtype=torch.float64))


def new_status(problem: Proximal) -> Tensor:
    return torch.zeros(problem.tasks, dtype=torch.int32, device=problem.theta.device)


def check_settings(*, lr: float | StepSize = 1.0, steps: int = 0, tol: float | None) -> None:
    if not isinstance(lr, StepSize):
        check_range("lr", lr, "(0, inf)")
    check_integer("steps", steps, minimum=0)
    if tol is not None:
        check_range("tol", tol, "[0, inf]")


def check_tol(problem: Proximal, tol: float | None) -> None:
    """Raises ValueError if the gradients of mini-batches would have to be compared with a `tol`."""
    if tol is not None and problem.batches is not None:
        raise ValueError(f"tol={tol} cannot be checked on mini-batches: pass tol=None")
