"""An inner solver from any Python function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext._checks import check_callable, check_choice
from imaml_ext.problem.layout import Params
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import InnerSolver, check_settings, new_status, unverified
from imaml_ext.solvers.solution import Solution


@dataclass(frozen=True)
class External(InnerSolver):
    """phi from any Python function, which is not differentiated: for solvers of other libraries.

    The implicit gradient depends only on phi. The report measures its quality: `residual` is
    `‖∇G_i(phi_i)‖`, and a task that does not reach `tol` is MAX_ITER, not CONVERGED.

    Args:
        fn: maps the inner problem to phi, [B, D] or {name: [B, ...]}. `problem.value_and_gradient`
            computes G and its gradient, `problem.one_by_one()` yields single tasks, and
            `problem.start()` [B, D] is their initial point.
        tol: a task is CONVERGED if `‖∇G_i‖ <= tol`; None: never.
        takes_mini_batches: whether fn uses mini-batches: `problem.objective_at(step)` has the
            losses of a step. Otherwise they are refused.

    Raises:
        TypeError, ValueError: a setting is invalid; or, by `solve`, fn did not return such a phi.
    """

    fn: Callable[[Proximal], Tensor | Params]
    tol: float | None = None
    takes_mini_batches: bool = False

    def __post_init__(self) -> None:
        check_callable("fn", self.fn, "(problem)")
        check_settings(tol=self.tol)
        check_choice("takes_mini_batches", self.takes_mini_batches, (False, True))

    def solve(self, problem: Proximal) -> Solution:
        found = self.fn(problem.copy())
        if isinstance(found, Mapping):
            phi = problem.layout.flatten(found, "phi")
        elif isinstance(found, Tensor):
            phi = found
        else:
            raise TypeError(
                f"the external solver must return a tensor or a dict, got {type(found).__name__}"
            )
        expected = (problem.tasks, problem.layout.dim)
        theta = problem.theta
        if phi.shape != expected or phi.dtype != theta.dtype or phi.device != theta.device:
            raise ValueError(
                f"the external solver must return {list(expected)} {theta.dtype} on "
                f"{theta.device}, got {list(phi.shape)} {phi.dtype} on {phi.device}"
            )
        status = new_status(problem)
        phi = phi.detach().clone(memory_format=torch.contiguous_format)
        return unverified(phi, status, torch.zeros_like(status))
