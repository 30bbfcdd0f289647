"""The implicit meta-gradient: the derivative of each task's optimum, from one linear solve at it.

With `phi_i = argmin L̂_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, `v_i = ∇L_i(phi_i)`,
`H_i = ∇²L̂_i(phi_i)` and `(H_i + Λ) x_i = v_i`:

    dL_i/dtheta = Λ x_i,     dL_i/dΛ = -x_i * (phi_i - theta)   (summed up for a scalar Λ).

Source: Rajeswaran, Finn, Kakade, Levine 2019, equation 6 and Algorithm 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from imaml_ext.cg import ConjugateGradient
from imaml_ext.flat import Lam, Layout, Params
from imaml_ext.inner import GradientDescent, InnerSolver, judge
from imaml_ext.objective import Loss, Objective
from imaml_ext.ops import prox_norms
from imaml_ext.solution import Solution, Status

Nonfinite = Literal["refuse", "skip"]


@dataclass(frozen=True)
class MetaGradient:
    """The meta-gradient of a batch of B tasks, and how it came about.

    Attributes:
        params: mean over tasks of dL_i/dtheta, tensors of theta's shapes.
        lam: the same for Λ, of lam's form; None where lam is a plain float.
        support_loss, query_loss: at phi, [B].
        adapted: phi, {name: [B, ...]}.
        inner: the inner solve; `residual` is `‖∇G_i(phi_i)‖` and `error_bound` estimates
            `‖phi_i - phi_i*‖`: delta of the paper's Algorithm 2. The bound needs the curvature of
            G_i itself: there is none with `curvature="ggn"`, whose smallest value is lam or more
            even at a saddle.
        cg: the linear solve; `error_bound` estimates `‖x_i - x_i*‖`, delta' of Algorithm 2, for the
            system that was solved, damping included.
    """

    params: Params
    lam: Any
    support_loss: Tensor
    query_loss: Tensor
    adapted: Params
    inner: Solution
    cg: Solution

    def named(self) -> Params:
        """Every gradient by name: parameters under their own, lam under "lam" or "lam.NAME"."""
        if isinstance(self.lam, Mapping):
            return self.params | {f"lam.{name}": grad for name, grad in self.lam.items()}
        return self.params if self.lam is None else self.params | {"lam": self.lam}

    @property
    def failed(self) -> Tensor:
        """Tasks whose losses or solves are not finite, [B] bool."""
        return _failed(self.inner, self.cg, self.query_loss)


def implicit_meta_grad(
    loss: Loss,
    params: Mapping[str, Tensor],
    support: Any,
    query: Any,
    *,
    lam: Lam,
    inner: InnerSolver | None = None,
    cg: ConjugateGradient | None = None,
    query_loss: Loss | None = None,
    adapted: Mapping[str, Tensor] | None = None,
    nonfinite: Nonfinite = "refuse",
) -> MetaGradient:
    """Adapt to a batch of tasks and differentiate the mean query loss through the adaptation.

    Memory does not depend on the number of inner steps or of CG iterations. Nothing synchronises.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}, float32 or float64.
        support, query: pytrees of [B, ...] tensors; `loss` gets one task's slice of them.
        lam: proximal strength: a positive float, a 0-d tensor, or a dict with, for each parameter,
            a 0-d tensor or a tensor of its shape.
        inner: inner solver; default `GradientDescent(lr=0.1, steps=16)`.
        cg: linear solver; default `ConjugateGradient(max_iter=5)`.
        query_loss: judged at phi instead of `loss`.
        adapted: use these phi, {name: [B, ...]}, and skip the inner solve.
        nonfinite: what a task with a non-finite loss, gradient or solve does to the mean. "refuse":
            the mean is NaN, so that it cannot go unnoticed. "skip": the mean is of the other tasks.

    Raises:
        TypeError, ValueError: the arguments do not fit; see each message.
    """
    if nonfinite not in ("refuse", "skip"):
        raise ValueError(f"nonfinite must be 'refuse' or 'skip', got {nonfinite!r}")
    layout = Layout(params)
    problem = _Problem(Objective(loss, layout, support, "support"), inner, cg)
    judged = Objective(query_loss or loss, layout, query, "query")
    tasks = problem.objective.tasks
    if judged.tasks != tasks:
        raise ValueError(f"support holds {tasks} tasks, query {judged.tasks}: B must be the same")
    theta = layout.flatten(params).detach()
    leaves, flat_lam = _lam_leaves(layout, lam)

    if adapted is None:
        solution = problem.adapt(theta, flat_lam.detach())
    else:
        solution = _given(layout.flatten(adapted, "adapted").detach(), tasks)
    phi = solution.value
    losses, v = judged.gradient(phi)
    support_loss, solution, system = problem.differentiate(solution, v, theta, flat_lam.detach())

    ok = ~_failed(solution, system, losses)
    to_theta, to_lam = _pull_back(system.value, phi, theta, flat_lam.detach(), ok)
    # In theta's dtype: 1 / tasks as a 0-d float32 tensor would round a float64 gradient.
    counted = ok.sum().to(theta.dtype)
    if nonfinite == "refuse":
        scale = torch.where(counted == tasks, 1 / counted, torch.nan)
    else:
        scale = 1 / counted.clamp_min(1)
    return MetaGradient(
        params=layout.unflatten(to_theta * scale),
        lam=_lam_gradient(leaves, flat_lam, to_lam * scale),
        support_loss=support_loss,
        query_loss=losses,
        adapted=layout.unflatten(phi),
        inner=solution,
        cg=system,
    )


def adapt(
    loss: Loss,
    params: Mapping[str, Tensor],
    support: Any,
    *,
    lam: Lam,
    inner: InnerSolver | None = None,
    cg: ConjugateGradient | None = None,
) -> Params:
    """phi_i = argmin G_i for a batch of tasks, {name: [B, ...]}, in the autograd graph.

    `backward` through the result applies the implicit function theorem: one linear solve fills the
    gradients of theta and of lam, whatever the inner solver did. It can be differentiated once.
    A task that is not finite makes the gradient NaN; for reports per task see `implicit_meta_grad`.

    Args, Raises: as for `implicit_meta_grad`.
    """
    layout = Layout(params)
    problem = _Problem(Objective(loss, layout, support, "support"), inner, cg)
    phi = _Adapt.apply(layout.flatten(params), layout.flatten_lam(lam), problem)
    return layout.unflatten(phi)


class _Problem:
    """The inner problems of one batch: how to solve them, and how to differentiate the solution."""

    def __init__(
        self, objective: Objective, inner: InnerSolver | None, cg: ConjugateGradient | None
    ) -> None:
        self.objective = objective
        self.inner = GradientDescent() if inner is None else inner
        self.cg = ConjugateGradient() if cg is None else cg

    def adapt(self, theta: Tensor, lam: Tensor) -> Solution:
        return self.inner.solve(self.objective, theta, lam)

    def differentiate(
        self, solution: Solution, v: Tensor, theta: Tensor, lam: Tensor
    ) -> tuple[Tensor, Solution, Solution]:
        """Support losses, the inner solution with its certificate, and `(H + Λ) x = v` solved."""
        phi = solution.value
        at_phi = self.objective.linearise(phi, self.cg.curvature)
        norm2, _ = prox_norms(phi, at_phi.gradient, theta, lam)
        # On CUDA lam's values have not been looked at: the tasks say so instead of a ValueError.
        usable = at_phi.losses.isfinite() & (lam.isfinite() & (lam > 0)).all()
        residual = torch.where(usable, norm2.sqrt(), torch.nan)
        status = judge(solution.status, residual, self.inner.tol)
        status = torch.where(status == Status.RUNNING, Status.MAX_ITER, status).to(torch.int32)
        system = self.cg.solve(at_phi.matvec, v, lam)
        inner = replace(solution, status=status, residual=residual)
        if self.cg.curvature == "hessian" and system.lanczos is not None:
            inner = replace(inner, lanczos=system.lanczos.shifted(-self.cg.damping))
        return at_phi.losses, inner, system


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, lam: Tensor, problem: _Problem) -> Tensor:
        phi = problem.adapt(theta.detach(), lam.detach()).value
        ctx.problem = problem
        ctx.save_for_backward(theta, lam, phi)
        return phi

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None]:
        theta, lam, phi = ctx.saved_tensors
        _, inner, system = ctx.problem.differentiate(
            _given(phi, ctx.problem.objective.tasks), v.contiguous(), theta, lam
        )
        ok = ~_failed(inner, system, inner.residual)
        to_theta, to_lam = _pull_back(system.value, phi, theta, lam, ok)
        poison = torch.where(ok.all(), 0.0, torch.nan).to(theta.dtype)
        return to_theta + poison, to_lam + poison, None


def _given(phi: Tensor, tasks: int) -> Solution:
    """phi from elsewhere, as a solution about which nothing is known yet."""
    if phi.dim() != 2 or phi.shape[0] != tasks:
        raise ValueError(f"adapted must hold {tasks} tasks, got {list(phi.shape[:-1])}")
    zeros = torch.zeros(tasks, dtype=torch.int32, device=phi.device)
    return Solution(phi, zeros, zeros, torch.full_like(zeros, torch.nan, dtype=torch.float64))


def _failed(inner: Solution, system: Solution, values: Tensor) -> Tensor:
    broken = (inner.status == Status.NONFINITE) | (system.status == Status.NONFINITE)
    return broken | ~values.isfinite()


def _pull_back(
    x: Tensor, phi: Tensor, theta: Tensor, lam: Tensor, ok: Tensor
) -> tuple[Tensor, Tensor]:
    """`Λ x_i` and `-x_i * (phi_i - theta)`, summed over the tasks that are ok."""
    mask = ok[:, None]
    x = torch.where(mask, x, 0.0)
    to_lam = -(x * torch.where(mask, phi - theta, 0.0)).sum(0)
    if lam.numel() == 1:
        to_lam = to_lam.sum().reshape(1)
    return lam * x.sum(0), to_lam


def _lam_leaves(layout: Layout, lam: Lam) -> tuple[Any, Tensor]:
    """Copies of lam's tensors that record gradients, and Λ as a function of them."""
    layout.flatten_lam(lam)  # its form, before anything is asked of its parts
    with torch.enable_grad():
        if isinstance(lam, Tensor):
            leaves: Any = lam.detach().requires_grad_()
        elif isinstance(lam, Mapping):
            leaves = {name: t.detach().requires_grad_() for name, t in lam.items()}
        else:
            return None, layout.flatten_lam(lam)
        return leaves, layout.flatten_lam(leaves)


def _lam_gradient(leaves: Any, flat_lam: Tensor, gradient: Tensor) -> Any:
    if leaves is None:
        return None
    if isinstance(leaves, Tensor):
        return torch.autograd.grad(flat_lam, leaves, gradient)[0]
    parts = torch.autograd.grad(flat_lam, list(leaves.values()), gradient)
    return dict(zip(leaves, parts, strict=True))
