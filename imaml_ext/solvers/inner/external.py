"""Anybody's solver."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.problem.layout import Params
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import InnerSolver, new_status, unverified
from imaml_ext.solvers.solution import Solution


@dataclass(frozen=True)
class External(InnerSolver):
    """phi from any Python callable: another library, a simulator, a search; none is differentiated.

    The implicit gradient needs nothing but phi. How good it is shows in the report: `residual` is
    `‖∇G_i(phi_i)‖`, and with `tol` a task that does not reach it is MAX_ITER, not CONVERGED.

    Args:
        fn: maps the inner problem to phi, [B, D] or {name: [B, ...]}. `problem.value_and_gradient`
            is G and its gradient; `problem.one_by_one()` gives single tasks; `problem.theta` [D] is
            where they start.
        tol: a task has arrived when `‖∇G_i‖ <= tol`; None: none has.

    Raises:
        TypeError, ValueError: fn returned something else.
    """

    fn: Callable[[Proximal], Tensor | Params]
    tol: float | None = None

    def solve(self, problem: Proximal) -> Solution:
        # A copy of theta, should fn write it; and fn may use autograd of its own.
        own = Proximal(problem.objective, problem.theta.clone(), problem.lam)
        with torch.enable_grad():
            found = self.fn(own)
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
