"""The implicit meta-gradient: the derivative of each task's optimum, from one linear solve at it.

With `phi_i = argmin L̂_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, `v_i = ∇L_i(phi_i)`,
`H_i = ∇²L̂_i(phi_i)` and `(H_i + Λ) x_i = v_i`:

    dL_i/dtheta = Λ x_i,     dL_i/dΛ = -x_i * (phi_i - theta)   for a diagonal Λ, its sum for a
                             scalar one, and -sym(x_i (phi_i - theta)') for a dense one.

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
    task_share,
)
from imaml_ext.methods.shared import check_shared, direct_gradient, gradient_through_phi
from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.lam import Lam, flatten_lam, lam_gradient, lam_leaves, matrix_product
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.objective import Loss, Objective
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

    Memory does not depend on the number of inner steps or of CG iterations. On CUDA nothing
    synchronises with solvers of up to 64 steps; longer ones wait for the device every 64, to see if
    all tasks are done.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}, float32 or float64.
        support, query: pytrees of [B, ...] tensors; `loss` gets one task's slice of them.
        lam: proximal strength: a positive float, a 0-d tensor, a dict with, for each parameter, a
            0-d tensor or a tensor of its shape, or one symmetric positive definite [D, D] tensor,
            D all parameters in the order of `params`.
        inner: inner solver; default `GradientDescent(lr=0.1, steps=16)`.
        linear: linear solver, any `LinearSolver`; default `ConjugateGradient(max_iter=5)`.
        query_loss: judged at phi instead of `loss`.
        shared: {name: tensor}, learned but not adapted, as ANIL's body is: the losses get them
            beside phi, and `out.extra` has their gradients. Exact with the Hessian alone: x is
            another one with `curvature="ggn"`.
        adapted: use these phi, {name: [B, ...]}, and skip the inner solve.
        nonfinite: what a task with a non-finite loss, gradient or solve does to the mean. "refuse":
            the mean is NaN, so that it cannot go unnoticed. "skip": the mean is of the other tasks.

    Returns:
        `params` is the mean over tasks of `Λ x_i`, where `(H_i + Λ) x_i = v_i`; `lam` is Λ's
        gradient; `inner` and `linear` say for each task how its solves went.

    Raises:
        TypeError, ValueError: the arguments do not fit; see each message.
        RuntimeError: under `torch.inference_mode`, where nothing can be differentiated.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
    """
    check_nonfinite(nonfinite)
    layout = Layout(params)
    solvers = _Solvers(inner, linear)
    psi = check_shared(shared, layout)
    objective = Objective(loss, layout, support, "support", psi)
    judged = Objective(query_loss or loss, layout, query, "query", psi)
    if judged.tasks != objective.tasks:
        raise ValueError(
            f"support holds {objective.tasks} tasks, query {judged.tasks}: B must be the same"
        )
    leaves, flat_lam = lam_leaves(layout, lam)
    problem = Proximal(objective, layout.flatten(params).detach(), flat_lam.detach())

    if adapted is None:
        solution = solvers.inner.solve(problem)
    else:
        solution = _given(layout.flatten(adapted, "adapted").detach(), problem)
    phi = solution.value
    losses, v = judged.gradient(phi)
    support_loss, solution, system = solvers.differentiate(problem, solution, v)

    ok = ~failed_tasks(losses, solution, system)
    to_psi: Params = {}
    if psi:
        direct = direct_gradient(judged, phi, ok)
        through_phi = gradient_through_phi(objective, phi, system.value, ok)
        to_psi = {name: direct[name] + through_phi[name] for name in psi}
        # It is a sum over the tasks: where it is not finite, none of them can be told apart.
        finite = torch.stack([slope.isfinite().all() for slope in to_psi.values()]).all()
        status = torch.where(finite, system.status, Status.NONFINITE).to(torch.int32)
        system, ok = replace(system, status=status), ok & finite
    share = task_share(ok, nonfinite, layout.dtype)
    to_theta, to_lam = _pull_back(system.value, phi, problem, ok, share)
    extra = {name: torch.where(finite, slope, 0.0) * share for name, slope in to_psi.items()}
    return ImplicitMetaGradient(
        params=layout.unflatten(to_theta),
        lam=lam_gradient(leaves, flat_lam, to_lam),
        support_loss=support_loss,
        query_loss=losses,
        adapted=layout.unflatten(phi),
        inner=solution,
        linear=system,
        extra=extra,
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

    `backward` through the result applies the implicit function theorem: one linear solve fills the
    gradients of theta, of lam and of what is shared, of those tensors that require them, whatever
    the inner solver did. It can be differentiated once, under the autocast that was in force here.
    What the loss closes over is a constant. A task that is not finite makes the gradient NaN; for
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
    """How to solve the inner problems of a batch, and how to differentiate the solution."""

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
        """Support losses, the inner solution with its certificate, and `(H + Λ) x = v` solved."""
        phi = solution.value
        at_phi = problem.objective.linearise(phi, self.linear.curvature)
        # On CUDA lam's values have not been looked at: the tasks say so instead of a ValueError.
        usable = at_phi.losses.isfinite() & problem.is_usable()
        residual = torch.where(usable, problem.residual(phi, at_phi.gradient), torch.nan)
        status = update_status(solution.status, residual, self.inner.tol)
        status = torch.where(status == Status.RUNNING, Status.MAX_ITER, status).to(torch.int32)
        system = self.linear.solve(
            at_phi.matvec, v, problem.lam, second_moment=solution.second_moment
        )
        system = _within_range(system, phi - problem.theta, problem.lam)
        inner = replace(solution, status=status, residual=residual)
        if self.linear.curvature == "hessian" and system.lanczos is not None:
            inner = replace(inner, lanczos=system.lanczos.shifted(-self.linear.damping))
        return at_phi.losses, inner, system


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
        ctx.precision = _autocast_of(theta.device.type)
        ctx.looking = recording if is_recording() else nullcontext
        ctx.objective, ctx.solvers, ctx.second_moment = objective, solvers, solution.second_moment
        ctx.save_for_backward(theta, lam, solution.value, *shared)
        return solution.value

    @staticmethod
    @eager
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        theta, lam, phi, *_ = ctx.saved_tensors  # the others to see that none was written
        problem = Proximal(ctx.objective, theta, lam)
        solution = replace(_given(phi, problem), second_moment=ctx.second_moment)
        psi: Params = {}
        # As in the forward pass, wherever backward() is called; on CUDA another thread runs it.
        with ctx.precision(), ctx.looking():
            _, inner, system = ctx.solvers.differentiate(problem, solution, v.contiguous())
            ok = ~failed_tasks(inner.residual, inner, system)
            if any(ctx.needs_input_grad[4:]):
                psi = gradient_through_phi(ctx.objective, phi, system.value, ok)
        whole = torch.where(ok.all(), 1.0, torch.nan).to(theta.dtype)
        to_shared = [psi[name] * whole if psi else None for name in ctx.objective.shared]
        return *_pull_back(system.value, phi, problem, ok, whole), None, None, *to_shared


def _autocast_of(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts with the autocast that is in force now."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
    )


def _given(phi: Tensor, problem: Proximal) -> Solution:
    """phi from elsewhere, as a solution about which nothing is known yet."""
    if phi.dim() != 2 or phi.shape[0] != problem.tasks:
        raise ValueError(f"adapted must hold {problem.tasks} tasks, got {list(phi.shape[:-1])}")
    status = new_status(problem)
    return unverified(phi, status, torch.zeros_like(status))


def _within_range(system: Solution, displacement: Tensor, lam: Tensor) -> Solution:
    """The linear solve, NONFINITE where the products of x with Λ or phi - theta may overflow.

    After an inner solve that explodes both can be finite, and a gradient that they make is not.
    """
    x = system.value
    x_norm, displacement_norm = row_dot(x, x).sqrt(), row_dot(displacement, displacement).sqrt()
    lam_norm = torch.linalg.vector_norm(lam, dtype=torch.float64)
    largest = x_norm * torch.maximum(displacement_norm, lam_norm)  # Cauchy-Schwarz
    # A task that failed in the inner solve says so there.
    overflows = (largest > torch.finfo(x.dtype).max / 4) & displacement_norm.isfinite()
    return replace(
        system,
        value=torch.where(overflows[:, None], 0.0, x),
        status=torch.where(overflows, Status.NONFINITE, system.status).to(torch.int32),
        residual=torch.where(overflows, torch.nan, system.residual),
    )


def _pull_back(
    x: Tensor, phi: Tensor, problem: Proximal, ok: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients by theta and Λ, summed over the tasks that are ok, each times its share.

    Shares come before the sum, which may overflow where the mean does not.
    """
    mask = ok[:, None]
    x = torch.where(mask, x, 0.0) * share
    displacement = torch.where(mask, phi - problem.theta, 0.0)
    to_theta = problem.strengthen(x.sum(0, keepdim=True))[0]
    if problem.lam.dim() == 2:
        product = matrix_product(x.T, displacement)
        return to_theta, -0.5 * (product + product.T)
    to_lam = -(x * displacement).sum(0)
    return to_theta, to_lam.sum().reshape(1) if problem.lam.numel() == 1 else to_lam
