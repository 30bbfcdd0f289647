"""The solves that differentiate a batch's inner problems at their solutions.

With `v_i` the gradient of the query loss at phi_i: `(H_i + Λ) x_i = v_i`, from which the gradients
of theta and Λ are sums over the tasks; see `implicit_meta_grad`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from imaml_ext._checks import check_instance
from imaml_ext._tracing import may_read_values
from imaml_ext.ops.rows import is_finite, is_not_finite, prox_norms, pull_back, row_dot
from imaml_ext.problem.lam_operator import SharedLam
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import GradientDescent, InnerSolver
from imaml_ext.solvers.inner.base import final_status, new_status, unverified
from imaml_ext.solvers.linear.base import LinearSolver
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.solution import Solution, Status


class Solvers:
    """The solver of the inner problems, and the linear solver that differentiates it."""

    def __init__(self, inner: InnerSolver | None, linear: LinearSolver | None) -> None:
        self.inner = GradientDescent() if inner is None else inner
        self.linear = ConjugateGradient() if linear is None else linear
        check_instance("inner", self.inner, InnerSolver, "pass GradientDescent(), or External(fn)")
        check_instance("linear", self.linear, LinearSolver, "pass one, such as ConjugateGradient()")

    def differentiate(
        self, problem: Proximal, solution: Solution, v: Tensor, x0: Tensor | None = None
    ) -> tuple[Tensor, Solution, Solution]:
        """Support losses, the completed report of the inner solve, and x with `(H + Λ) x = v`."""
        phi = solution.value
        at_phi = problem.objective.linearise(phi, self.linear.curvature)
        unusable = is_not_finite(at_phi.losses)
        if not may_read_values(phi):  # then lam's values have not been checked
            unusable = unusable | ~problem.lam.is_valid()
        residual = problem.residual(phi, at_phi.gradient).masked_fill(unusable, torch.nan)
        status = final_status(solution.status, residual, self.inner.tol)
        x = self.linear.solve(
            at_phi.matvec, v, problem.lam.values, second_moment=solution.second_moment, x0=x0
        )
        x = _without_overflow(x, phi, problem)
        inner = replace(solution, status=status, residual=residual)
        if self.linear.curvature == "hessian" and x.lanczos is not None:
            inner = replace(inner, lanczos=x.lanczos.shifted(-self.linear.damping))
        return at_phi.losses, inner, x


def check_all_or_none_learned(params: Mapping[str, Tensor]) -> None:
    """Raises ValueError if some of the parameters require grad, and others do not."""
    frozen = [name for name, tensor in params.items() if not tensor.requires_grad]
    if frozen and len(frozen) < len(params):
        raise ValueError(
            f"params[{frozen[0]!r}] does not require grad, but other parameters do: leave it out "
            "of params to keep its value, or call requires_grad_() to adapt it"
        )


def rows_of(label: str, params: Mapping[str, Tensor], objective: Objective) -> Tensor:
    """[B, D] from {name: [B, ...]}, without a graph."""
    rows = objective.layout.flatten(params, label).detach()
    if rows.dim() != 2 or rows.shape[0] != objective.tasks:
        raise ValueError(f"{label} must have {objective.tasks} tasks, got {list(rows.shape[:-1])}")
    return rows


def given(phi: Tensor, problem: Proximal) -> Solution:
    """A given phi [B, D] as the solution of an inner solve."""
    status = new_status(problem)
    return unverified(phi, status, torch.zeros_like(status))


def _without_overflow(solution: Solution, phi: Tensor, problem: Proximal) -> Solution:
    """The linear solve, NONFINITE where the products of x with Λ or phi - theta may overflow.

    If an inner solve diverges, both factors can be finite and the gradient infinite.
    """
    x = solution.value
    _, distance2 = prox_norms(phi, phi, problem.theta, phi.new_ones(1))  # as the penalty of Λ = I
    x2, limit = row_dot(x, x), torch.finfo(x.dtype).max / 4
    lam_norm = problem.lam.norm()
    if may_read_values(x):
        most = max(max(distance2.tolist()) ** 0.5, lam_norm.max().item())
        if max(x2.tolist()) ** 0.5 * most <= limit:
            return solution
    displacement_norm = distance2.sqrt()
    largest = x2.sqrt() * torch.maximum(displacement_norm, lam_norm)  # Cauchy-Schwarz
    # A displacement that is not finite is already reported by the inner solve.
    overflows = (largest > limit) & is_finite(displacement_norm)
    return replace(
        solution,
        value=x.masked_fill(overflows[:, None], 0.0),
        status=solution.status.masked_fill(overflows, Status.NONFINITE),
        residual=solution.residual.masked_fill(overflows, torch.nan),
    )


def is_first_order(x: Solution) -> Tensor:
    """Tasks where negative curvature in the first iteration left `x = Λ^-1 v`, [B] bool.

    That gives theta the gradient of first-order methods, which take phi - theta to be a constant.
    So lam, shared parameters and data get no gradient through phi in these tasks; x would give them
    one of the order of `1 / lam`.
    """
    return (x.status == Status.NEGATIVE_CURVATURE) & (x.steps == 0)


def pull_back_sum(
    x: Tensor, phi: Tensor, problem: Proximal, ok: Tensor, first_order: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of theta and Λ: weighted sums over the tasks that are ok, [B] bool.

    Weights are applied before the sum, which may overflow where the mean does not. The gradient of
    a Λ per task is not summed.
    """
    theta, lam, displaced = problem.theta, problem.lam, ok & ~first_order
    if not isinstance(lam, SharedLam):
        # A Λ of a task that failed may itself be NaN.
        pulled = torch.where(ok[:, None], lam.mv(x), 0.0) * weight
        x = torch.where(ok[:, None], x, 0.0) * weight
        displacement = torch.where(displaced[:, None], phi - theta, 0.0)
        return pulled.sum(0), lam.gradient(x, displacement)
    use = ok.to(torch.int32) + displaced.to(torch.int32)
    x_sum, products = pull_back(x, phi, theta, weight.reshape(1), use)
    return lam.mv(x_sum), lam.gradient_of_products(products)
