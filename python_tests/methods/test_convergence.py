"""The warning of `adapt`, against solutions in closed form."""

import warnings

import pytest
import torch
from ridge_problems import EXACT, LAM, data, fit, learned, randn, ridge
from torch.func import vmap

from imaml_ext import (
    MINRES,
    ConjugateGradient,
    ConvergenceWarning,
    External,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    adapt,
)


def test_adapt_warns_if_its_gradient_is_inaccurate():
    (x, y), query = data(), data()
    theta = learned()

    def warned(**settings):
        phi = adapt(fit, theta, (x, y), lam=0.05, **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vmap(fit)(phi, query).mean().backward()
        assert all(each.category is ConvergenceWarning for each in caught)
        assert all(each.filename == __file__ for each in caught)
        return [str(each.message) for each in caught]

    (message,) = warned()
    assert "adapt has not converged: it is off by an estimated" in message
    assert "take more steps of the inner solver" in message
    for linear in (ConjugateGradient(max_iter=1), NeumannSeries(max_iter=2)):
        (message,) = warned(inner=EXACT["inner"], linear=linear)
        assert "the linear solve of adapt has not converged" in message
        assert "raise max_iter" in message
    assert warned(warn=False) == []
    assert warned(**EXACT) == []
    assert warned(inner=EXACT["inner"], linear=NeumannSeries(max_iter=500)) == []


def test_without_a_warning_phi_is_accurate():
    silent, loud = 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        (x, y), theta = data(), learned()
        inner = GradientDescent(lr=0.1, steps=int(torch.randint(1, 40, ())))
        phi = adapt(fit, theta, (x, y), lam=LAM, inner=inner)["w"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            phi.sum().backward()
        exact = torch.stack([ridge(a, b, theta["w"]) for a, b in zip(x, y, strict=True)])
        error = (phi - exact).norm() / (phi - theta["w"]).norm()
        assert error > 0.03 if caught else error < 0.15
        silent, loud = silent + (not caught), loud + bool(caught)
    assert silent > 10
    assert loud > 10


def test_the_curvature_of_a_long_linear_solve_is_estimated_from_its_beginning():
    x, y = randn(2, 200, 100), randn(2, 200)
    long = ConjugateGradient(max_iter=150, rtol=1e-12)
    phi = adapt(
        fit, {"w": randn(100)}, (x.requires_grad_(), y), lam=1e-3,
        inner=HessianFree(steps=2, linear=long, damping=0.0), linear=long,
    )  # fmt: skip
    phi["w"].sum().backward()  # warnings are errors
    assert x.grad.norm() > 0


def test_a_task_without_a_query_gradient_does_not_hide_the_others():
    (x, y), theta = data(), learned()
    phi = adapt(fit, theta, (x, y), lam=1e-3)
    with pytest.warns(ConvergenceWarning):
        phi["w"][1].sum().backward()  # v = 0 for the others


def test_the_remedy_is_that_of_the_solver_that_stopped_too_early():
    (x, y), theta = data(), learned()
    exact = ConjugateGradient(max_iter=100, rtol=1e-12)
    loose = [
        (HessianFree(steps=3, linear=exact, damping=0.0), ConjugateGradient(max_iter=1)),
        (HessianFree(steps=3, linear=exact, damping=0.0), ConjugateGradient(50, rtol=0.9)),
        (GradientDescent(lr=1e-3, steps=1), exact),
        (GradientDescent(lr=1e-3, steps=1, tol=100.0), exact),
    ]
    remedies = ["raise max_iter of the linear", "lower rtol", "take more steps", "lower tol"]
    for (inner, linear), remedy in zip(loose, remedies, strict=True):
        phi = adapt(fit, theta, (x, y), lam=0.05, inner=inner, linear=linear)
        with pytest.warns(ConvergenceWarning, match=remedy):
            phi["w"].sum().backward()


def test_a_saddle_point_in_one_task_does_not_hide_the_warning():
    def loss(p, d):
        return d[0] * p["w"].square().sum() / 2

    curvature, theta = torch.tensor([[1.0], [-3.0], [2.0]]).double(), torch.zeros(2).double()
    phi = adapt(loss, {"w": theta.requires_grad_()}, curvature, lam=0.5)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        phi["w"].sum().backward()


def test_an_unsolved_inner_problem_is_reported_with_a_neumann_series():
    phi = adapt(
        fit, learned(), data(), lam=LAM,
        inner=GradientDescent(lr=1e-3, steps=2), linear=NeumannSeries(max_iter=2000),
    )  # fmt: skip
    with pytest.warns(ConvergenceWarning, match="adapt has not converged"):
        phi["w"].sum().backward()


def test_minres_at_a_saddle_point_is_no_reason_for_a_warning():
    curvature = torch.tensor([3.0, -2.0, 1.0, 5.0]).double()

    def saddle(p, d):
        return (curvature * p["w"].square()).sum() / 2 - (d * p["w"]).sum()

    b, theta = randn(3, 4), {"w": torch.zeros(4).double().requires_grad_()}
    stationary = External(lambda problem: b / (curvature + 0.5))
    phi = adapt(saddle, theta, b, lam=0.5, inner=stationary, linear=MINRES(max_iter=9, rtol=1e-12))
    phi["w"].sum().backward()  # warnings are errors
    torch.testing.assert_close(theta["w"].grad, 3 * 0.5 / (curvature + 0.5))


def test_tasks_at_their_optimum_are_no_reason_for_a_warning_in_float32():
    x, theta = torch.randn(3, 30, 10) * torch.logspace(0, -2, 10), torch.randn(10)
    theta.requires_grad_()
    with torch.no_grad():
        y = x @ theta
    cg = ConjugateGradient(max_iter=40)
    phi = adapt(
        fit, {"w": theta}, (x, y), lam=1e-3,
        inner=HessianFree(steps=1, linear=cg, damping=0.0), linear=cg,
    )  # fmt: skip
    phi["w"].sum().backward()
