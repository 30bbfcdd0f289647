"""The implicit meta-gradient: each task's optimum is differentiated by one linear solve.

With `phi_i = argmin L̂_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, `v_i = ∇L_i(phi_i)`,
`H_i = ∇²L̂_i(phi_i)` and `(H_i + Λ) x_i = v_i`:

    dL_i/dtheta = Λ x_i,     dL_i/dΛ = -x_i * (phi_i - theta)   for a diagonal Λ, its sum for a
                             scalar Λ, and -sym(x_i (phi_i - theta)') for a dense Λ.

Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imaml_ext._tracing import eager, is_recording, recording
from imaml_ext.methods.meta_gradient import (
    ImplicitMetaGradient,
    Nonfinite,
    check_nonfinite,
    failed_tasks,
    task_weight,
)
from imaml_ext.methods.shared import check_shared, direct_gradient, gradient_through_phi
from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.lam import Lam, LamOperator, flatten_lam, unflatten_lam_gradient
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.objective import Loss, Objective, check_same_tasks
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import GradientDescent, InnerSolver
from imaml_ext.solvers.inner.base import new_status, unverified, update_status
from imaml_ext.solvers.linear.base import LinearSolver
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.solution import Solution, Status


@eager
def implicit_meta_grad(
    loss: Loss,
    params: Mapping[str, Tensor],
    support: Any,
    query: Any,
    *,
    lam: Lam,
    inner: InnerSolver | None = None,
    linear: LinearSolver | None = None,
    query_loss: Loss | None = None,
    shared: Mapping[str, Tensor] | None = None,
    adapted: Mapping[str, Tensor] | None = None,
    nonfinite: Nonfinite = "propagate",
) -> ImplicitMetaGradient:
    """Adapt to a batch of tasks and differentiate the mean query loss through the adaptation.

    Memory does not depend on the number of inner steps or of CG iterations. On CUDA, solvers of up
    to 64 steps do not synchronise; longer ones do every 64 steps, to stop when all tasks are done.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}, float32 or float64.
        support, query: pytrees of [B, ...] tensors; `loss` receives one task's slice of them.
        lam: proximal strength: a positive float, a 0-d tensor, a dict with, for each parameter, a
            0-d tensor or a tensor of its shape, or one symmetric positive definite [D, D] tensor,
            where D counts all parameters in the order of `params`.
        inner: inner solver; default `GradientDescent(lr=0.1, steps=16)`.
        linear: linear solver; default `ConjugateGradient(max_iter=5)`.
        query_loss: evaluated at phi on the query set, instead of `loss`.
        shared: {name: tensor}, learned but not adapted, such as ANIL's body. The losses receive
            them together with phi, and `out.shared` has their gradients. Exact only with
            `curvature="hessian"`.
        adapted: use these phi, {name: [B, ...]}, and skip the inner solve.
        nonfinite: effect of a task with a non-finite loss, gradient or solve. "propagate": the mean
            gradient is NaN, so that it cannot go unnoticed. "omit": the mean is over the other
            tasks.

    Returns:
        `params` is the mean over tasks of `Λ x_i`, where `(H_i + Λ) x_i = v_i`; `lam` is the
        gradient with respect to Λ; `inner` and `linear` report on the solves of each task.

    Raises:
        TypeError, ValueError: an argument is invalid.
        RuntimeError: under `torch.inference_mode`, where nothing can be differentiated.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
    """
    check_nonfinite(nonfinite)
    layout = Layout(params)
    solvers = _Solvers(inner, linear)
    psi = check_shared(shared, layout)
    objective = Objective(loss, layout, support, "support", psi)
    query_objective = Objective(query_loss or loss, layout, query, "query", psi)
    check_same_tasks(objective, query_objective)
    flat_lam = flatten_lam(layout, lam).detach()
    problem = Proximal(objective, layout.flatten(params).detach(), flat_lam)

    if adapted is None:
        solution = solvers.inner.solve(problem)
    else:
        solution = _given(layout.flatten(adapted, "adapted").detach(), problem)
    phi = solution.value
    losses, v = query_objective.gradient(phi)
    support_loss, solution, x = solvers.differentiate(problem, solution, v)

    ok = ~failed_tasks(losses, solution, x)
    psi_gradient: Params = {}
    if psi:
        direct = direct_gradient(query_objective, phi, ok)
        through_phi = gradient_through_phi(objective, phi, x.value, ok)
        psi_gradient = {name: direct[name] + through_phi[name] for name in psi}
        # A sum over the tasks: if it is not finite, the task responsible is unknown, so all fail.
        finite = torch.stack([g.isfinite().all() for g in psi_gradient.values()]).all()
        status = torch.where(finite, x.status, Status.NONFINITE).to(torch.int32)
        x, ok = replace(x, status=status), ok & finite
    weight = task_weight(ok, nonfinite, layout.dtype)
    theta_gradient, lam_gradient = _pull_back(x.value, phi, problem, ok, weight)
    return ImplicitMetaGradient(
        params=layout.unflatten(theta_gradient),
        lam=unflatten_lam_gradient(layout, lam, lam_gradient),
        support_loss=support_loss,
        query_loss=losses,
        adapted=layout.unflatten(phi),
        inner=solution,
        linear=x,
        shared={name: torch.where(finite, g, 0.0) * weight for name, g in psi_gradient.items()},
    )


@eager
def adapt(
    loss: Loss,
    params: Mapping[str, Tensor],
    support: Any,
    *,
    lam: Lam,
    inner: InnerSolver | None = None,
    linear: LinearSolver | None = None,
    shared: Mapping[str, Tensor] | None = None,
) -> Params:
    """phi_i = argmin G_i for a batch of tasks, {name: [B, ...]}, in the autograd graph.

    `backward` through the result applies the implicit function theorem, whatever the inner solver:
    one linear solve fills the gradients of those tensors of theta, lam and shared that require
    grad. The result can be differentiated once, under the autocast state of this call. Tensors in
    the closure of the loss are constants. A task that is not finite makes the gradient NaN; for
    reports per task see `implicit_meta_grad`.

    Args:
        loss, params, support, lam, inner, linear, shared: as in `implicit_meta_grad`.

    Returns:
        phi, {name: [B, ...]}.

    Raises:
        TypeError, ValueError, RuntimeError: as `implicit_meta_grad`.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6.
    """
    layout = Layout(params)
    psi = check_shared(shared, layout)
    objective = Objective(loss, layout, support, "support", psi)
    theta, flat_lam = layout.flatten(params), flatten_lam(layout, lam)
    solvers = _Solvers(inner, linear)
    return layout.unflatten(
        _Adapt.apply(theta, flat_lam, objective, solvers, *(shared or {}).values())
    )


class _Solvers:
    """The solver of the inner problems, and the linear solver that differentiates it."""

    def __init__(self, inner: InnerSolver | None, linear: LinearSolver | None) -> None:
        self.inner = GradientDescent() if inner is None else inner
        self.linear = ConjugateGradient() if linear is None else linear
        if not isinstance(self.inner, InnerSolver):
            raise TypeError(f"inner must be an InnerSolver, got {type(inner).__name__}")
        if not isinstance(self.linear, LinearSolver):
            raise TypeError(f"linear must be a LinearSolver, got {type(linear).__name__}")

    def differentiate(
        self, problem: Proximal, solution: Solution, v: Tensor
    ) -> tuple[Tensor, Solution, Solution]:
        """Support losses, the completed report of the inner solve, and x with `(H + Λ) x = v`."""
        phi = solution.value
        at_phi = problem.objective.linearise(phi, self.linear.curvature)
        # On CUDA lam's values have not been checked: an invalid one makes the tasks NONFINITE.
        usable = at_phi.losses.isfinite() & problem.lam.is_positive_definite()
        residual = torch.where(usable, problem.residual(phi, at_phi.gradient), torch.nan)
        status = update_status(solution.status, residual, self.inner.tol)
        status = torch.where(status == Status.RUNNING, Status.MAX_ITER, status).to(torch.int32)
        x = self.linear.solve(
            at_phi.matvec, v, problem.lam.values, second_moment=solution.second_moment
        )
        x = _without_overflow(x, phi - problem.theta, problem.lam)
        inner = replace(solution, status=status, residual=residual)
        if self.linear.curvature == "hessian" and x.lanczos is not None:
            inner = replace(inner, lanczos=x.lanczos.shifted(-self.linear.damping))
        return at_phi.losses, inner, x


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        lam: Tensor,
        objective: Objective,
        solvers: _Solvers,
        *shared: Tensor,
    ) -> Tensor:
        solution = solvers.inner.solve(Proximal(objective, theta.detach(), lam.detach()))
        ctx.autocast = _current_autocast(theta.device.type)
        ctx.recording = recording if is_recording() else nullcontext
        ctx.objective, ctx.solvers, ctx.second_moment = objective, solvers, solution.second_moment
        ctx.save_for_backward(theta, lam, solution.value, *shared)
        return solution.value

    @staticmethod
    @eager
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        theta, lam, phi, *_ = ctx.saved_tensors  # the rest: checked for in-place changes by torch
        problem = Proximal(ctx.objective, theta, lam)
        solution = replace(_given(phi, problem), second_moment=ctx.second_moment)
        psi: Params = {}
        # Contexts as in the forward pass: on CUDA another thread runs this.
        with ctx.autocast(), ctx.recording():
            _, inner, x = ctx.solvers.differentiate(problem, solution, v.contiguous())
            ok = ~failed_tasks(inner.residual, inner, x)
            if any(ctx.needs_input_grad[4:]):
                psi = gradient_through_phi(ctx.objective, phi, x.value, ok)
        weight = torch.where(ok.all(), 1.0, torch.nan).to(theta.dtype)
        to_shared = [psi[name] * weight if psi else None for name in ctx.objective.shared]
        return *_pull_back(x.value, phi, problem, ok, weight), None, None, *to_shared


def _current_autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """A function that returns a context with the current autocast state."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
    )


def _given(phi: Tensor, problem: Proximal) -> Solution:
    """A given phi as the solution of an inner solve."""
    if phi.dim() != 2 or phi.shape[0] != problem.tasks:
        raise ValueError(f"adapted must have {problem.tasks} tasks, got {list(phi.shape[:-1])}")
    status = new_status(problem)
    return unverified(phi, status, torch.zeros_like(status))


def _without_overflow(solution: Solution, displacement: Tensor, lam: LamOperator) -> Solution:
    """The linear solve, NONFINITE where the products of x with Λ or phi - theta may overflow.

    If an inner solve diverges, both factors can be finite and the gradient infinite.
    """
    x = solution.value
    x_norm, displacement_norm = row_dot(x, x).sqrt(), row_dot(displacement, displacement).sqrt()
    lam_norm = torch.linalg.vector_norm(lam.values, dtype=torch.float64)
    largest = x_norm * torch.maximum(displacement_norm, lam_norm)  # Cauchy-Schwarz
    # A displacement that is not finite is already reported by the inner solve.
    overflows = (largest > torch.finfo(x.dtype).max / 4) & displacement_norm.isfinite()
    return replace(
        solution,
        value=torch.where(overflows[:, None], 0.0, x),
        status=torch.where(overflows, Status.NONFINITE, solution.status).to(torch.int32),
        residual=torch.where(overflows, torch.nan, solution.residual),
    )


def _pull_back(
    x: Tensor, phi: Tensor, problem: Proximal, ok: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of theta and Λ: weighted sums over the tasks that are ok, [B] bool.

    Weights are applied before the sum, which may overflow where the mean does not.
    """
    mask = ok[:, None]
    x = torch.where(mask, x, 0.0) * weight
    displacement = torch.where(mask, phi - problem.theta, 0.0)
    return problem.lam.mv(x.sum(0, keepdim=True))[0], problem.lam.gradient(x, displacement)
