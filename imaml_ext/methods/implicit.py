"""The implicit meta-gradient: each task's optimum is differentiated by one linear solve.

With `phi_i = argmin L̂_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, `v_i = ∇L_i(phi_i)`,
`H_i = ∇²L̂_i(phi_i)` and `(H_i + Λ) x_i = v_i`:

    dL_i/dtheta = Λ x_i,     dL_i/dΛ = -x_i * (phi_i - theta)   for a diagonal Λ, its sum for a
                             scalar Λ, and -sym(x_i (phi_i - theta)') for a dense Λ.

Λ may differ from task to task; then Λ_i takes the place of Λ.

Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imaml_ext._tracing import eager
from imaml_ext.data.mini_batches import split_batches
from imaml_ext.methods.base import check_losses
from imaml_ext.methods.meta_gradient import (
    ImplicitMetaGradient,
    Nonfinite,
    check_nonfinite,
    failed_tasks,
    relative_weights,
    task_weight,
)
from imaml_ext.methods.shared import (
    all_finite,
    check_shared,
    direct_gradient,
    gradient_through_phi,
)
from imaml_ext.methods.solves import (
    Solvers,
    check_all_or_none_learned,
    given,
    is_first_order,
    pull_back_sum,
    rows_of,
)
from imaml_ext.methods.warm_start import start_at
from imaml_ext.problem.lam import Lam, flatten_lam, unflatten_lam_gradient
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.objective import Loss, Objective, check_same_tasks
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import InnerSolver
from imaml_ext.solvers.inner.base import solve_inner
from imaml_ext.solvers.linear.base import LinearSolver
from imaml_ext.solvers.solution import Status


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
    start: Mapping[str, Tensor] | None = None,
    x0: Tensor | None = None,
    weights: Tensor | None = None,
    nonfinite: Nonfinite = "propagate",
) -> ImplicitMetaGradient:
    """Adapt to a batch of tasks and differentiate the mean query loss through the adaptation.

    Memory does not depend on the number of inner steps or of CG iterations. On CUDA, solvers of up
    to 64 steps do not synchronise; longer ones do every 64 steps, to stop when all tasks are done.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}, float32 or float64.
        support, query: pytrees of [B, ...] tensors; `loss` receives one task's slice of them.
            `support` may be `MiniBatches`.
        lam: proximal strength: a positive float, a 0-d tensor, a dict with, for each parameter, a
            0-d tensor or a tensor of its shape, or one symmetric positive definite [D, D] tensor,
            where D counts all parameters in the order of `params`. For one per task, a tensor [B]
            or [B, D], or a dict that has, for some or all parameters, a tensor [B, *shape], or
            [B, 1, ..., 1] for one number per task; a tensor [B, D] with B = D is a dense matrix. 0
            for no proximal term: theta is only the initial point, its gradient is 0, and H alone
            must be positive definite.
        inner: inner solver; default `GradientDescent(lr=0.1, steps=16)`.
        linear: linear solver; default `ConjugateGradient(max_iter=5)`.
        query_loss: evaluated at phi on the query set, instead of `loss`.
        shared: {name: tensor}, learned but not adapted, such as ANIL's body. The losses receive
            them together with phi, and `out.shared` has their gradients. Exact only with
            `curvature="hessian"`.
        adapted: use these phi, {name: [B, ...]}, and skip the inner solve.
        start: initial phi of the inner solver, {name: [B, ...]}, such as `out.adapted` of the last
            call for the same tasks; default theta. A task whose start is not finite starts at
            theta.
        x0: where the linear solve starts, [B, D], such as `out.linear.value` of the last call; see
            `LinearSolver.solve`.
        weights: [B], finite and not negative, for the weighted mean `Σ w_i g_i / Σ w_i` over the
            tasks. A task of weight 0, such as padding, contributes nothing, even if it is not
            finite. Invalid weights make the gradient NaN on CUDA, where checking them would
            synchronise.
        nonfinite: effect of a task with a non-finite loss, gradient or solve. "propagate": the mean
            gradient is NaN, so that it cannot go unnoticed. "omit": the mean is over the other
            tasks.

    Returns:
        `params` is the mean over tasks of `Λ x_i`, where `(H_i + Λ) x_i = v_i`; `lam` is the
        gradient of the mean query loss with respect to Λ, with one entry per task if lam has;
        `inner` and `linear` report on the solves of each task.

    Raises:
        TypeError, ValueError: an argument is invalid; the losses depend on another tensor that
            requires grad; the data require grad (see `adapt`); some of `params` do, and others not.
        RuntimeError: under `torch.inference_mode`, where nothing can be differentiated.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
    """
    check_nonfinite(nonfinite)
    check_losses(loss, query_loss)
    layout = Layout(params)
    check_all_or_none_learned(params)
    solvers = Solvers(inner, linear)
    psi = check_shared(shared, layout, loss, query_loss)
    support, batches = split_batches(support)
    objective = Objective(loss, layout, support, "support", psi)
    query_objective = Objective(query_loss or loss, layout, query, "query", psi)
    check_same_tasks(objective, query_objective)
    flat_lam = flatten_lam(layout, lam).detach()
    with torch.no_grad():
        theta = layout.flatten(params)
        first = None if start is None else start_at(rows_of("start", start, objective), theta)
        problem = Proximal(objective, theta, flat_lam, start=first, batches=batches)
    shares = relative_weights(weights, problem.tasks, problem.theta)

    if adapted is None:
        solution = solve_inner(solvers.inner, problem)
    elif start is not None:
        raise ValueError("adapted skips the inner solve: remove start, or adapted")
    else:
        solution = given(rows_of("adapted", adapted, objective), problem)
    phi = solution.value
    losses, v = query_objective.gradient(phi)
    support_loss, solution, x = solvers.differentiate(problem, solution, v, x0)

    ok = ~failed_tasks(losses, solution, x)
    first_order = is_first_order(x)
    x_rows = x.value if shares is None else x.value * shares[:, None]
    psi_gradient: Params = {}
    if psi:
        direct = direct_gradient(query_objective, phi, ok, shares)
        through = gradient_through_phi(objective, phi, x_rows, ok, first_order)
        psi_gradient = {name: a + b for name, a, b in zip(psi, direct, through, strict=True)}
        # A sum over the tasks: if it is not finite, the task responsible is unknown, so all fail.
        finite = all_finite(psi_gradient)
        status = x.status.masked_fill(~finite, Status.NONFINITE)
        x, ok = replace(x, status=status), ok & finite
    weight = task_weight(ok, nonfinite, layout.dtype, shares)
    theta_gradient, lam_gradient = pull_back_sum(x_rows, phi, problem, ok, first_order, weight)
    return ImplicitMetaGradient(
        params=layout.unflatten(theta_gradient),
        lam=unflatten_lam_gradient(layout, lam, lam_gradient),
        support_loss=support_loss,
        query_loss=losses,
        adapted=layout.unflatten(phi),
        inner=solution,
        linear=x,
        shared={name: torch.where(finite, g, 0.0) * weight for name, g in psi_gradient.items()},
        weights=shares,
    )
