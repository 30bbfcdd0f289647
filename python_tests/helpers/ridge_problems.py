"""Ridge regressions as inner problems, and their solutions in closed form; float64."""

import torch

from imaml_ext import ConjugateGradient, HessianFree

CG = ConjugateGradient(max_iter=60, rtol=1e-13)
EXACT = {"inner": HessianFree(steps=4, linear=CG, damping=0.0), "linear": CG}
LAM = 0.3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def data(tasks=3, features=4):
    return randn(tasks, 9, features), randn(tasks, 9)


def fit(p, d):
    return (d[0] @ p["w"] - d[1]).square().mean()


def ridge(x, y, theta, lam=LAM, weight=None):
    """The minimum of the weighted mean squared error and the proximal term, in closed form."""
    weighted = 2 / len(y) * (x if weight is None else weight[:, None] * x)
    matrix = weighted.T @ x + lam * torch.eye(x.shape[1]).double()
    return torch.linalg.solve(matrix, weighted.T @ y + lam * theta)


def learned(features=4):
    return {"w": randn(features).requires_grad_()}


def assert_same_gradients(value, exact, tensors):
    got = torch.autograd.grad(value, tensors, retain_graph=True)
    want = torch.autograd.grad(exact, tensors, retain_graph=True)
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def squared(outputs, y):
    return (outputs[:, 0] - y).square().mean()
