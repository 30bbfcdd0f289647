"""Adapted parameters in the autograd graph, by the implicit function theorem."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._tracing import eager, is_recording, may_read_values, recording
from imaml_ext.data.mini_batches import MiniBatches, split_batches
from imaml_ext.methods.base import check_losses
from imaml_ext.methods.convergence import warn_if_inaccurate
from imaml_ext.methods.meta_gradient import failed_tasks
from imaml_ext.methods.shared import check_shared, gradient_through_phi
from imaml_ext.methods.solves import (
    Solvers,
    check_all_or_none_learned,
    given,
    is_first_order,
    pull_back_sum,
    rows_of,
)
from imaml_ext.methods.warm_start import WarmStart, start_at
from imaml_ext.ops.batching import call_for_each, is_grads_batched
from imaml_ext.problem.lam import Lam, flatten_lam
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.objective import Loss, Objective
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import InnerSolver
from imaml_ext.solvers.inner.base import solve_inner
from imaml_ext.solvers.linear.base import LinearSolver


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
    start: Mapping[str, Tensor] | None = None,
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
        start: initial phi of each task, {name: [B, ...]}; default theta. Needed if lam is the
            weight decay of a network: theta is then 0, a saddle point. Ignored once `warm_start`
            has solutions.
        warm_start: keeps the solutions for these tasks from call to call; the inner and the linear
            solve start at the last ones.
        warn: whether `backward` issues a `ConvergenceWarning` if the relative errors of phi and of
            the linear solve, estimated from residuals and curvature, exceed 10% in sum. They are
            those of all tasks together, in which one with a large phi may hide another. None: only
            on the CPU, because it synchronises on CUDA.

    Returns:
        phi, a dict of [B, ...] tensors by name.

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
    first = None if start is None else rows_of("start", start, objective)
    call = _Call(objective, Solvers(inner, linear), tuple(leaves), warn, warm_start, first, batches)
    inputs = (*(shared or {}).values(), *leaves.values())
    theta, flat_lam = layout.flatten(params), flatten_lam(layout, lam)
    return layout.unflatten(_Adapt.apply(theta, flat_lam, call, *inputs))


class _Call(NamedTuple):
    """The constants of a call of `adapt`."""

    objective: Objective
    solvers: Solvers
    leaves: tuple[int, ...]  # of support: those that require grad
    warn: bool | None
    last: WarmStart | None
    first: Tensor | None  # initial phi [B, D]
    batches: MiniBatches | None


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, lam: Tensor, call: _Call, *inputs: Tensor) -> Tensor:
        objective, solvers, last = call.objective, call.solvers, call.last
        known = call.first if last is None or last.phi is None else last.phi
        start = None if known is None else start_at(known, theta.detach())
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
        ctx.call, ctx.status, ctx.second_moment = call, solution.status, solution.second_moment
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
        objective, solvers, leaves, warn, last, *_ = ctx.call
        objective.usage.check_unchanged()
        theta, lam, phi, *_ = ctx.saved_tensors  # the rest: checked for in-place changes by torch
        problem = Proximal(objective, theta, lam)
        solution = replace(given(phi, problem), status=ctx.status, second_moment=ctx.second_moment)
        inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad[3:])
        # Contexts as in the forward pass: on CUDA another thread runs this.
        with ctx.autocast(), ctx.recording():
            x0 = None if last is None else last.x
            _, inner, x = solvers.differentiate(problem, solution, v.contiguous(), x0)
            if last is not None:
                last.x = x.value
            ok = ~failed_tasks(inner.residual, inner, x)
            first_order = is_first_order(x)
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
        return *pull_back_sum(x.value, phi, problem, ok, first_order, weight), None, *inputs


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
