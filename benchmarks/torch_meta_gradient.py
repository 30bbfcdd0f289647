"""The meta-gradient of a batch in PyTorch, with the library and without it.

Each function takes a `Workload` and returns a function that computes the mean meta-gradient, [D].
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Implementation
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from workload import Workload

from imaml_ext import (
    ConjugateGradient,
    GradientDescent,
    RecordedMetaGradient,
    Status,
    TaskBatch,
    implicit_meta_grad,
    reference,
)
from imaml_ext.problem.layout import Params


def library(workload: Workload) -> Implementation:
    """`implicit_meta_grad`."""
    w = workload

    def call() -> Tensor:
        return w.layout.flatten(_solve(w).params)

    return call


def recorded(workload: Workload) -> Implementation:
    """The same, recorded in the first call: programs on the CPU, a CUDA graph on CUDA."""
    w = workload
    record: RecordedMetaGradient | None = None

    def call() -> Tensor:
        nonlocal record
        batch = TaskBatch(w.support, w.query)
        if record is None:
            record = RecordedMetaGradient(lambda own: _solve(w, own), batch)
        return w.layout.flatten(record(batch).params)

    return call


def check_work(workload: Workload) -> None:
    """Exits unless every task of the library's solve took all CG iterations."""
    status = _solve(workload).linear.status
    if not (status == Status.MAX_ITER).all():
        raise SystemExit(f"some tasks stopped early: status {status.tolist()}")


def _solve(workload: Workload, batch: TaskBatch | None = None) -> Any:
    w = workload
    support, query = (w.support, w.query) if batch is None else (batch.support, batch.query)
    return implicit_meta_grad(
        w.loss, w.params, support, query, lam=w.lam,
        inner=GradientDescent(lr=w.lr, steps=w.inner_steps),
        linear=ConjugateGradient(max_iter=w.cg_steps),
    )  # fmt: skip


def lean_loop(workload: Workload) -> Implementation:
    """imaml_ext/reference.py, one task at a time, on a flat vector."""
    w = workload
    lam = w.theta.new_full((1,), w.lam)

    def loss(row: Tensor, data: Any) -> Tensor:
        return w.loss(w.layout.unflatten(row), data)

    def call() -> Tensor:
        total = torch.zeros_like(w.theta)
        for task in range(w.tasks):
            total += reference.implicit_meta_gradient(
                loss, w.theta, *w.task(task), lam,
                lr=w.lr, inner_steps=w.inner_steps, cg_steps=w.cg_steps,
            )[0]  # fmt: skip
        return total / w.tasks

    return call


def authors_loop(workload: Workload) -> Implementation:
    """Organised like the authors' code, with the equations of the paper.

    A module per task and a list of parameters; every product is flattened to a vector, and computes
    the outputs, the gradient and the derivative of `gradient · vector`; CG checks on the host
    whether to stop.
    """
    w = workload

    def flat(tensors: Any) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def one_task(support: Any, query: Any) -> Tensor:
        phi = {name: t.detach().clone().requires_grad_() for name, t in w.params.items()}
        leaves = list(phi.values())
        for _ in range(w.inner_steps):
            gradients = torch.autograd.grad(w.loss(phi, support), leaves)
            with torch.no_grad():
                for leaf, gradient, start in zip(leaves, gradients, w.params.values(), strict=True):
                    leaf -= w.lr * (gradient + w.lam * (leaf - start))

        def product(p: Tensor) -> Tensor:
            gradients = torch.autograd.grad(w.loss(phi, support), leaves, create_graph=True)
            return flat(torch.autograd.grad(flat(gradients) @ p, leaves)) + w.lam * p

        b = flat(torch.autograd.grad(w.loss(phi, query), leaves))
        x, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rr = r @ r
        for _ in range(w.cg_steps):
            ap = product(p)
            alpha = rr / (p @ ap)
            x = x + alpha * p
            r = r - alpha * ap
            rr_new = r @ r
            if rr_new.item() == 0:
                break
            p = r + (rr_new / rr) * p
            rr = rr_new
        return w.lam * x

    return lambda: sum(one_task(*w.task(task)) for task in range(w.tasks)) / w.tasks


def batched_eager(workload: Workload) -> Implementation:
    """All tasks at once, with `torch.func`; Hessian-vector products by forward over reverse."""

    def product(gradient: Any, phi: Params, p: Params) -> Params:
        hp: Params = jvp(gradient, (phi,), (p,))[1]
        return hp

    return _batched(workload, product, lambda function: function)


def batched_compiled(workload: Workload) -> Implementation:
    """As `batched_eager`, with the inner step, the start of CG and the CG iteration compiled.

    Products by reverse over reverse: compiled forward over reverse crashes on the CPU (torch 2.13).
    """

    def product(gradient: Any, phi: Params, p: Params) -> Params:
        hp: Params = vjp(gradient, phi)[1](p)[0]
        return hp

    return _batched(workload, product, lambda function: torch.compile(function, dynamic=False))


def _batched(
    workload: Workload,
    product: Callable[[Any, Params, Params], Params],
    compiled: Callable[[Any], Any],
) -> Implementation:
    w = workload

    # Not vmap(grad(loss)): in torch 2.13 its derivative through batch norm is silently wrong.
    gradient = grad(lambda phi, data: vmap(w.plain_loss)(phi, data).sum())
    theta = {name: tensor.detach()[None] for name, tensor in w.params.items()}

    def dot(a: Params, b: Params) -> Tensor:
        return torch.stack([(a[name] * b[name]).flatten(1).sum(1) for name in a]).sum(0)

    def along(coefficient: Tensor, direction: Params) -> Params:
        """`coefficient_i direction_i` for every task i."""
        return {
            name: coefficient.view(-1, *[1] * (tensor.dim() - 1)) * tensor
            for name, tensor in direction.items()
        }

    def descend(phi: Params, support: Any) -> Params:
        at = gradient(phi, support)
        return {name: p - w.lr * (at[name] + w.lam * (p - theta[name])) for name, p in phi.items()}

    def start(phi: Params, query: Any) -> tuple[Params, Tensor]:
        v = gradient(phi, query)
        return v, dot(v, v)

    def iterate(
        x: Params, r: Params, p: Params, rr: Tensor, phi: Params, support: Any
    ) -> tuple[Params, Params, Params, Tensor]:
        hp = product(lambda at: gradient(at, support), phi, p)
        ap = {name: hp[name] + w.lam * tensor for name, tensor in p.items()}
        alpha = rr / dot(p, ap)
        step, change = along(alpha, p), along(alpha, ap)
        x = {name: tensor + step[name] for name, tensor in x.items()}
        r = {name: tensor - change[name] for name, tensor in r.items()}
        rr_new = dot(r, r)
        old = along(rr_new / rr, p)
        return x, r, {name: r[name] + old[name] for name in r}, rr_new

    descend, start, iterate = compiled(descend), compiled(start), compiled(iterate)

    @torch.no_grad()
    def call() -> Tensor:
        phi = {name: t.expand(w.tasks, *t.shape[1:]).contiguous() for name, t in theta.items()}
        for _ in range(w.inner_steps):
            phi = descend(phi, w.support)
        v, rr = start(phi, w.query)
        x = {name: torch.zeros_like(tensor) for name, tensor in v.items()}
        r, p = v, {name: tensor.clone() for name, tensor in v.items()}
        for _ in range(w.cg_steps):
            x, r, p, rr = iterate(x, r, p, rr, phi, w.support)
        return w.layout.flatten({name: w.lam * t.mean(0) for name, t in x.items()})

    return call


IMPLEMENTATIONS: dict[str, Callable[[Workload], Implementation]] = {
    "imaml_ext": library,
    "imaml_ext, recorded": recorded,
    "lean loop over tasks": lean_loop,
    "the authors' loop": authors_loop,
    "batched PyTorch, eager": batched_eager,
    "batched PyTorch, compiled": batched_compiled,
}
