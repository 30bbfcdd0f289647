"""Derivatives of an objective, to compare the layers' operators with plain vmap."""

import torch


def product_with_graph(objective, rows, v):
    at = rows.clone().requires_grad_()
    (first,) = torch.autograd.grad(objective.losses(at).sum(), at, create_graph=True)
    (product,) = torch.autograd.grad(first, at, v, create_graph=True)
    return at, first, product


def derivatives(objective, rows):
    """Losses, gradients, Hessian products with and without a graph, Gauss-Newton products."""
    v = torch.randn_like(rows)
    _, first, product = product_with_graph(objective, rows, v)
    without_graph = [objective.linearise(rows, kind).matvec(v) for kind in ("hessian", "ggn")]
    return [objective.losses(rows), first, product, *without_graph]


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def both(monkeypatch, compute):
    torch.manual_seed(1)
    got = compute()
    monkeypatch.setenv("IMAML_LAYERS", "torch")
    torch.manual_seed(1)
    return got, compute()
