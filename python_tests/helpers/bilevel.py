"""Bilevel problems in plain PyTorch, one task at a time, by dense Newton steps: an oracle."""

import copy

import torch
from torch.utils import _pytree as pytree


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def number(value):
    """A hyperparameter: a 0-d tensor that requires grad."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def tasks(data):
    """The data of each task, from a pytree of [B, ...] tensors."""
    count = len(pytree.tree_leaves(data)[0])
    return [pytree.tree_map(lambda leaf, i=i: leaf[i], data) for i in range(count)]


def minimum(objective, start):
    """The minimum of `objective`, a convex function of {name: tensor} around `start`.

    It is in the graph of the tensors that the objective closes over: at a minimum phi, the result
    is the Newton step `phi - H^-1 g`, where g is 0, but its derivative is that of phi.
    """
    sizes = [t.numel() for t in start.values()]

    def at(row):
        parts = zip(start, row.split(sizes), strict=True)
        return {name: part.view(start[name].shape) for name, part in parts}

    def flat(row):
        return objective(at(row))

    row = torch.cat([t.detach().flatten() for t in start.values()])
    for _ in range(50):
        leaf = row.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(flat(leaf), leaf, create_graph=True)
        # Not torch.func.hessian, which is wrong for batch norm (forward over reverse, torch 2.13).
        (hessian,) = torch.autograd.grad(
            gradient, leaf, torch.eye(len(row)).double(), is_grads_batched=True, retain_graph=True
        )
        step = torch.linalg.solve(hessian, gradient.detach())
        if step.norm() < 1e-12 * (1 + row.norm()):
            assert torch.linalg.eigvalsh(hessian)[0] > 0
            return at(row - torch.linalg.solve(hessian, gradient))
        length, now = 1.0, flat(row)
        while flat(row - length * step) > now and length > 1e-4:
            length /= 2
        row = row - length * step
    raise AssertionError(f"Newton's method did not converge: gradient {gradient.norm()}")


def value(inner, outer, start, support, query):
    """The mean over tasks of `outer(phi_i, query_i)` at `phi_i = argmin inner(phi, support_i)`."""
    losses = []
    for own, held_out in zip(tasks(support), tasks(query), strict=True):
        phi = minimum(lambda phi, own=own: inner(phi, own), start)
        losses.append(outer(phi, held_out))
    return torch.stack(losses).mean()


def proximal(loss, theta, lam):
    """The loss with `1/2 lam |phi - theta|^2`; lam is a number, or {name: tensor}."""
    strength = lam if isinstance(lam, dict) else dict.fromkeys(theta, lam)

    def objective(phi, data):
        terms = [(strength[name] * (phi[name] - t).square()).sum() for name, t in theta.items()]
        return loss(phi, data) + 0.5 * sum(terms)

    return objective


def descended(model, criterion, data, lr, steps, **settings):
    """A copy of the model after steps of `torch.optim.SGD` on one task's data."""
    own, (x, y) = copy.deepcopy(model), data
    optimizer = torch.optim.SGD(own.parameters(), lr=lr, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(own(x), y).backward()
        optimizer.step()
    return own


def same(got, want, rtol=1e-8, atol=1e-10):
    """Asserts that two sequences of tensors agree."""
    got, want = list(got), list(want)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.detach(), exact.detach(), rtol=rtol, atol=atol)
    assert max(exact.abs().max() for exact in want) > 1e-5  # it is not 0 against 0
