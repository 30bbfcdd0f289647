"""Cases of the authors' code (aravindr93/imaml_dev) and paper: its quadratic problems.

Re-created: linear regression on features, whose minimum and meta-gradient are known in closed
form; the matrix `(I + H/lam)^-1` of equation 6; conjugate gradient of few steps; Theorem 1, the
error of an inexact solution; one gradient, whatever the inner solver; a strength that is learned.
The authors' own deviations from the paper are tested in experiments/test_authors_code.py.
"""

from itertools import pairwise

import pytest
import torch
from bilevel import number, randn, same

from imaml_ext import (
    LBFGS,
    Adam,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    adapt,
    implicit_meta_grad,
)

DIM, TASKS = 6, 4
CG = ConjugateGradient(max_iter=40, rtol=1e-13)


def squares(params, data):
    x, y = data
    return 0.5 * (x @ params["w"] - y).square().mean()


@pytest.fixture
def setting():
    """Four regressions of condition number 1e3, with different weights, and theta."""
    scale = torch.logspace(0, -1.5, DIM, dtype=torch.float64)

    def data(weights):
        x = randn(TASKS, 20, DIM) * scale
        return x, (x @ weights)[..., 0] + 0.1 * randn(TASKS, 20)

    weights = randn(TASKS, DIM, 1)
    return data(weights), data(weights), randn(DIM)


def moments(data):
    x, y = data
    return x.mT @ x / 20, (x.mT @ y[..., None])[..., 0] / 20


def closed_form(setting, lam):
    """phi of every task and the exact meta-gradient of every task, [B, D]."""
    support, query, theta = setting
    (h, c), (hq, cq) = moments(support), moments(query)
    eye = torch.eye(DIM, dtype=torch.float64)
    phi = torch.linalg.solve(h + lam * eye, c + lam * theta)
    v = (hq @ phi[..., None])[..., 0] - cq
    return phi, torch.linalg.solve(eye + h / lam, v)


def gradient(setting, lam, **settings):
    support, query, theta = setting
    return implicit_meta_grad(squares, {"w": theta}, support, query, lam=lam, **settings)


@pytest.mark.parametrize("lam", [1e-3, 0.1, 2.0, 100.0])
def test_the_meta_gradient_is_that_of_equation_6(setting, lam):
    phi, each = closed_form(setting, lam)
    inner = HessianFree(steps=3, linear=CG, damping=0.0)
    out = gradient(setting, lam, inner=inner, linear=CG)
    same([out.adapted["w"], out.params["w"]], [phi, each.mean(0)])


# With lam = 1 the condition number is about 2, and 60 steps of descent are exact.
INNER = {
    "gradient descent": GradientDescent(lr=0.6, steps=60),
    "with momentum": GradientDescent(lr=0.5, steps=100, momentum=0.3),
    "adam": Adam(lr=0.05, steps=400),
    "l-bfgs": LBFGS(steps=100, tol=1e-12),
    "hessian-free": HessianFree(steps=20, linear=CG, tol=1e-12),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_gradient_does_not_depend_on_the_inner_solver(setting, inner):
    _, each = closed_form(setting, 1.0)
    out = gradient(setting, 1.0, inner=inner, linear=CG)
    same([out.params["w"]], [each.mean(0)], rtol=1e-7)  # Adam ends near the minimum


def test_more_steps_of_conjugate_gradient_come_closer_to_the_exact_gradient(setting):
    phi, each = closed_form(setting, 1e-3)
    errors = []
    for steps in range(1, DIM + 1):
        linear = ConjugateGradient(max_iter=steps)
        out = gradient(setting, 1e-3, adapted={"w": phi}, linear=linear)
        errors.append((out.params["w"] - each.mean(0)).norm() / each.mean(0).norm())
    assert errors[1] > 1e-3  # two steps leave an error, as in figure 2a
    assert errors[-1] < 1e-8  # D steps are exact
    assert all(later < 10 * earlier for earlier, later in pairwise(errors))


def test_the_direction_of_the_first_step_of_conjugate_gradient_is_the_first_order_gradient(setting):
    phi, _ = closed_form(setting, 2.0)
    hq, cq = moments(setting[1])
    v = (hq @ phi[..., None])[..., 0] - cq
    h, _ = moments(setting[0])
    av = (h @ v[..., None])[..., 0] + 2.0 * v
    want = 2.0 * v * ((v * v).sum(1) / (v * av).sum(1))[:, None]
    out = gradient(setting, 2.0, adapted={"w": phi}, linear=ConjugateGradient(max_iter=1))
    same([out.params["w"]], [want.mean(0)])


@pytest.mark.parametrize("steps", [5, 20, 80])
def test_the_error_of_an_inexact_solution_is_within_that_of_theorem_1(setting, steps):
    # phi is off by delta and x by delta': the gradient is off by at most lam (|Hq|/mu delta +
    # delta'), where mu is the smallest curvature; for a quadratic the Hessian is constant.
    lam, count = 0.05, 3
    phi, each = closed_form(setting, lam)
    out = gradient(
        setting, lam, inner=GradientDescent(lr=0.7, steps=steps),
        linear=ConjugateGradient(max_iter=count),
    )  # fmt: skip
    (h, _), (hq, cq) = moments(setting[0]), moments(setting[1])
    own, eye = out.adapted["w"], torch.eye(DIM, dtype=torch.float64)
    delta = (own - phi).norm(dim=1)
    v = (hq @ own[..., None])[..., 0] - cq
    exact_x = torch.linalg.solve(h + lam * eye, v)
    delta_x = (out.linear.value - exact_x).norm(dim=1)
    curvature = torch.linalg.eigvalsh(h + lam * eye)[:, 0]
    bound = lam * (torch.linalg.matrix_norm(hq, 2) / curvature * delta + delta_x)
    error = (lam * out.linear.value - each).norm(dim=1)
    assert (error <= bound * (1 + 1e-9)).all()
    residual = (h @ own[..., None])[..., 0] - moments(setting[0])[1] + lam * (own - setting[2])
    same([out.inner.residual], [residual.norm(dim=1)])
    assert (out.inner.residual / curvature >= delta).all()  # what the estimates are based on


def test_the_error_estimates_are_those_of_the_whole_spectrum_after_all_iterations(setting):
    # After D iterations the Ritz values are the eigenvalues, and the estimates are bounds.
    lam = 0.05
    phi, _ = closed_form(setting, lam)
    out = gradient(
        setting, lam, inner=GradientDescent(lr=0.7, steps=20),
        linear=ConjugateGradient(max_iter=DIM),
    )  # fmt: skip
    h, _ = moments(setting[0])
    smallest = torch.linalg.eigvalsh(h)[:, 0] + lam
    same([out.inner.error_estimate], [out.inner.residual / smallest], rtol=1e-6)
    assert (out.inner.error_estimate >= (out.adapted["w"] - phi).norm(dim=1)).all()


def test_a_learned_strength_has_the_gradient_of_the_closed_form(setting):
    lam = number(0.3)
    support, query, theta = setting
    theta = theta.requires_grad_()
    phi, _ = closed_form((support, query, theta), lam)
    hq, cq = moments(query)
    # The query loss is 1/2 phi' Hq phi - cq' phi and a constant.
    loss = 0.5 * (phi * (hq @ phi[..., None])[..., 0]).sum(1) - (phi * cq).sum(1)
    want = torch.autograd.grad(loss.mean(), [lam, theta])
    inner = HessianFree(steps=3, linear=CG, damping=0.0)
    out = gradient((support, query, theta.detach()), lam, inner=inner, linear=CG)
    same([out.lam, out.params["w"]], want)
    phi = adapt(squares, {"w": theta}, support, lam=lam, inner=inner, linear=CG)
    torch.func.vmap(squares)(phi, query).mean().backward()
    same([lam.grad, theta.grad], want)
