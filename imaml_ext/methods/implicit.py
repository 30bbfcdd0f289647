"""The implicit meta-gradient: each task's optimum is differentiated by one linear solve.

With `phi_i = argmin L̂_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, `v_i = ∇L_i(phi_i)`,
`H_i = ∇²L̂_i(phi_i)` and `(H_i + Λ) x_i = v_i`:

    dL_i/dtheta = Λ x_i,     dL_i/dΛ = -x_i * (phi_i - theta)   for a diagonal Λ, its sum for a
                             scalar Λ, and -sym(x_i (phi_i - theta)') for a dense Λ.

Λ may differ from task to task; then Λ_i takes the place of Λ.

Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_instance
from imaml_ext._tracing import eager, is_recording, may_read_values, recording
from imaml_ext.data.mini_batches import MiniBatches, split_batches
from imaml_ext.methods.base import check_losses
from imaml_ext.methods.convergence import warn_if_inaccurate
from imaml_ext.methods.meta_gradient import (
    ImplicitMetaGradient,
    Nonfinite,
    check_nonfinite,
    failed_tasks,
    relative_weights,
    task_weight,
)
from imaml_ext.methods.shared import check_shared, direct_gradient, gradient_through_phi
from imaml_ext.methods.warm_start import WarmStart, start_at
from imaml_ext.ops.batching import call_for_each, is_grads_batched
from imaml_ext.ops.rows import is_finite, is_not_finite, prox_norms, pull_back, row_dot
from imaml_ext.problem.lam import Lam, flatten_lam, unflatten_lam_gradient
from imaml_ext.problem.lam_operator import SharedLam
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.objective import Loss, Objective, check_same_tasks
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import GradientDescent, InnerSolver
from imaml_ext.solvers.inner.base import new_status, solve_inner, unverified, update_status
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
            or [B, D], or a dict that has, for some or all parameters, a tensor [B, *shape]; a
            tensor [B, D] with B = D is a dense matrix. 0 for no proximal term: theta is only the
            initial point, its gradient is 0, and H alone must be positive definite.
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
    solvers = _Solvers(inner, linear)
    psi = check_shared(shared, layout, loss, query_loss)
    support, batches = split_batches(support)
    objective = Objective(loss, layout, support, "support", psi)
    query_objective = Objective(query_loss or loss, layout, query, "query", psi)
    check_same_tasks(objective, query_objective)
    flat_lam = flatten_lam(layout, lam).detach()
    with torch.no_grad():
        theta = layout.flatten(params)
        first = None if start is None else start_at(_rows("start", start, objective), theta)
        problem = Proximal(objective, theta, flat_lam, start=first, batches=batches)
    shares = relative_weights(weights, problem.tasks, problem.theta)

    if adapted is None:
        solution = solve_inner(solvers.inner, problem)
    elif start is not None:
        raise ValueError("adapted skips the inner solve: remove start, or adapted")
    else:
        solution = _given(_rows("adapted", adapted, objective), problem)
    phi = solution.value
    losses, v = query_objective.gradient(phi)
    support_loss, solution, x = solvers.differentiate(problem, solution, v, x0)

    ok = ~failed_tasks(losses, solution, x)
    first_order = _is_first_order(x)
    x_rows = x.value if shares is None else x.value * shares[:, None]
    psi_gradient: Params = {}
    if psi:
        direct = direct_gradient(query_objective, phi, ok, shares)
        through = gradient_through_phi(objective, phi, x_rows, ok, first_order)
        psi_gradient = {name: a + b for name, a, b in zip(psi, direct, through, strict=True)}
        # A sum over the tasks: if it is not finite, the task responsible is unknown, so all fail.
        finite = torch.stack([g.isfinite().all() for g in psi_gradient.values()]).all()
        status = x.status.masked_fill(~finite, Status.NONFINITE)
        x, ok = replace(x, status=status), ok & finite
    weight = task_weight(ok, nonfinite, layout.dtype, shares)
    theta_gradient, lam_gradient = _pull_back(x_rows, phi, problem, ok, first_order, weight)
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
    warm_start: WarmStart | None = None,
    warn: bool | None = None,
) -> Params:
    """phi_i = argmin G_i for a batch of tasks, {name: [B, ...]}, in the autograd graph.

    `backward` through the result applies the implicit function theorem, whatever the inner solver:
    one linear solve gives the gradients of theta, lam, shared and support, as far as their tensors
    require grad or have a graph. The result can be differentiated once, under the autocast state of
    this call. A task that is not finite makes the gradient NaN; for reports per task see
    `implicit_meta_grad`.

    Args:
        loss, params, lam, inner, linear, shared: as in `implicit_meta_grad`.
        support: a pytree of [B, ...] tensors; they may require grad, such as the features of a
            learned body, learned labels or example weights. Exact only with `curvature="hessian"`.
            It may be `MiniBatches`.
        warm_start: start the inner and the linear solve at their last solutions for the same
            tasks, which this object keeps from call to call.
        warn: whether `backward` issues a `ConvergenceWarning` if the relative errors of phi and of
            the linear solve, estimated from residuals and curvature, exceed 10% in sum. None: only
            on the CPU, because it synchronises on CUDA.

    Returns:
        phi, {name: [B, ...]}.

    Raises:
        TypeError, ValueError, RuntimeError: as `implicit_meta_grad`. `backward` raises a
            RuntimeError with `create_graph=True`, or if support, other tensors that the loss uses,
            or the training mode of its model have been changed since.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6.
    """
    check_losses(loss)
    layout = Layout(params)
    check_all_or_none_learned(params)
    psi = check_shared(shared, layout, loss)
    support, batches = split_batches(support)
    data = pytree.tree_map_only(Tensor, Tensor.detach, support)
    # Without grad mode, nothing is differentiated, whatever the loss depends on.
    check = torch.is_grad_enabled()
    objective = Objective(loss, layout, data, "support", psi, check=check, track=True)
    leaves = {k: t for k, t in enumerate(pytree.tree_leaves(support)) if t.requires_grad}
    if warm_start is not None:
        warm_start.check(objective)
    call = _Call(objective, _Solvers(inner, linear), tuple(leaves), warn, warm_start, batches)
    inputs = (*(shared or {}).values(), *leaves.values())
    theta, flat_lam = layout.flatten(params), flatten_lam(layout, lam)
    return layout.unflatten(_Adapt.apply(theta, flat_lam, call, *inputs))


class _Solvers:
    """The solver of the inner problems, and the linear solver that differentiates it."""

    def __init__(self, inner: InnerSolver | None, linear: LinearSolver | None) -> None:
        self.inner = GradientDescent() if inner is None else inner
        self.linear = ConjugateGradient() if linear is None else linear
        check_instance("inner", self.inner, InnerSolver, "pass one, such as GradientDescent()")
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
        status = update_status(solution.status, residual, self.inner.tol)
        status = status.masked_fill(status == Status.RUNNING, Status.MAX_ITER)
        x = self.linear.solve(
            at_phi.matvec, v, problem.lam.values, second_moment=solution.second_moment, x0=x0
        )
        x = _without_overflow(x, phi, problem)
        inner = replace(solution, status=status, residual=residual)
        if self.linear.curvature == "hessian" and x.lanczos is not None:
            inner = replace(inner, lanczos=x.lanczos.shifted(-self.linear.damping))
        return at_phi.losses, inner, x


class _Call(NamedTuple):
    """The constants of a call of `adapt`."""

    objective: Objective
    solvers: _Solvers
    leaves: tuple[int, ...]  # of support: those that require grad
    warn: bool | None
    last: WarmStart | None
    batches: MiniBatches | None


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, lam: Tensor, call: _Call, *inputs: Tensor) -> Tensor:
        objective, solvers, last = call.objective, call.solvers, call.last
        start = None
        if last is not None and last.phi is not None:
            start = start_at(last.phi, theta.detach())
        problem = Proximal(
            objective, theta.detach(), lam.detach(), start=start, batches=call.batches
        )
        solution = solve_inner(solvers.inner, problem)
        if last is not None:
            last.phi = solution.value.detach()
        assert objective.usage is not None
        if not objective.usage.recorded:  # an external solver need not evaluate the losses
            objective.losses(solution.value)
        ctx.autocast = _current_autocast(theta.device.type)
        ctx.recording = recording if is_recording() else nullcontext
        ctx.call, ctx.second_moment = call, solution.second_moment
        ctx.save_for_backward(theta, lam, solution.value, *inputs)
        return solution.value

    @staticmethod
    @eager
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the result of adapt can be differentiated only once: call backward or "
                "autograd.grad without create_graph=True"
            )
        if is_grads_batched(v):
            return call_for_each(partial(_Adapt.backward, ctx), v)
        objective, solvers, leaves, warn, last, _ = ctx.call
        objective.usage.check_unchanged()
        theta, lam, phi, *_ = ctx.saved_tensors  # the rest: checked for in-place changes by torch
        problem = Proximal(objective, theta, lam)
        solution = replace(_given(phi, problem), second_moment=ctx.second_moment)
        inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad[3:])
        # Contexts as in the forward pass: on CUDA another thread runs this.
        with ctx.autocast(), ctx.recording():
            x0 = None if last is None else last.x
            _, inner, x = solvers.differentiate(problem, solution, v.contiguous(), x0)
            if last is not None:
                last.x = x.value
            ok = ~failed_tasks(inner.residual, inner, x)
            first_order = _is_first_order(x)
            if any(ctx.needs_input_grad[3:]):
                inputs[:] = gradient_through_phi(objective, phi, x.value, ok, first_order, leaves)
            if warn or (warn is None and may_read_values(phi)):
                warn_if_inaccurate(problem, inner, x, v)
        weight = torch.where(ok.all(), 1.0, torch.nan).to(theta.dtype)
        count = len(objective.shared)
        inputs[:count] = [None if g is None else g * weight for g in inputs[:count]]
        for k, rows in enumerate(inputs[count:], count):
            if rows is not None:  # one per task
                inputs[k] = torch.where(ok.view(-1, *[1] * (rows.dim() - 1)), rows, torch.nan)
        return *_pull_back(x.value, phi, problem, ok, first_order, weight), None, *inputs


def check_all_or_none_learned(params: Mapping[str, Tensor]) -> None:
    """Raises ValueError if some of the parameters require grad, and others do not."""
    frozen = [name for name, tensor in params.items() if not tensor.requires_grad]
    if frozen and len(frozen) < len(params):
        raise ValueError(
            f"params[{frozen[0]!r}] does not require grad, but other parameters do: leave it out "
            "of params to keep its value, or call requires_grad_() to adapt it"
        )


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


def _rows(label: str, params: Mapping[str, Tensor], objective: Objective) -> Tensor:
    """[B, D] from {name: [B, ...]}, without a graph."""
    rows = objective.layout.flatten(params, label).detach()
    if rows.dim() != 2 or rows.shape[0] != objective.tasks:
        raise ValueError(f"{label} must have {objective.tasks} tasks, got {list(rows.shape[:-1])}")
    return rows


def _given(phi: Tensor, problem: Proximal) -> Solution:
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


def _is_first_order(x: Solution) -> Tensor:
    """Tasks where negative curvature in the first iteration left `x = Λ^-1 v`, [B] bool.

    That gives theta the gradient of first-order methods, which take phi - theta to be a constant.
    So lam, shared parameters and data get no gradient through phi in these tasks; x would give them
    one of the order of `1 / lam`.
    """
    return (x.status == Status.NEGATIVE_CURVATURE) & (x.steps == 0)


def _pull_back(
    x: Tensor, phi: Tensor, problem: Proximal, ok: Tensor, first_order: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of theta and Λ: weighted sums over the tasks that are ok, [B] bool.

    Weights are applied before the sum, which may overflow where the mean does not. The gradient of
    a Λ per task is not summed.
    """
    theta, lam, displaced = problem.theta, problem.lam, ok & ~first_order
    if not isinstance(lam, SharedLam):
        x = torch.where(ok[:, None], x, 0.0) * weight
        displacement = torch.where(displaced[:, None], phi - theta, 0.0)
        return lam.mv(x).sum(0), lam.gradient(x, displacement)
    use = ok.to(torch.int32) + displaced.to(torch.int32)
    x_sum, products = pull_back(x, phi, theta, weight.reshape(1), use)
    return lam.mv(x_sum), lam.gradient_of_products(products)
