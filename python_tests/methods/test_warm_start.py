"""Solves that start where the last ones for the same tasks ended."""

import warnings

import pytest
import torch
from problems import regression
from ridge_problems import LAM, assert_same_gradients, data, fit, learned, ridge
from torch.func import vmap

from imaml_ext import (
    LBFGS,
    MINRES,
    Adam,
    ConjugateGradient,
    ConvergenceWarning,
    External,
    GradientDescent,
    HessianFree,
    Status,
    WarmStart,
    adapt,
    implicit_meta_grad,
)

CG = ConjugateGradient(max_iter=100, rtol=1e-10)
SOLVERS = {
    "gd": GradientDescent(lr=0.2, steps=200, tol=1e-6),
    "momentum": GradientDescent(lr=0.1, steps=200, momentum=0.8, tol=1e-7),
    "adam": Adam(lr=0.02, steps=800, tol=1e-5),
    "hessian-free": HessianFree(steps=40, linear=CG, tol=1e-9),
    "lbfgs": LBFGS(steps=200, tol=1e-9),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_inner_solver_starts_at_the_given_phi(name, device):
    problem = regression(3, device)
    call = (problem.loss, problem.params, problem.support, problem.query)
    settings = {"lam": 1.0, "inner": SOLVERS[name], "linear": CG}
    cold = implicit_meta_grad(*call, **settings)
    warm = implicit_meta_grad(*call, start=cold.adapted, x0=cold.linear.value, **settings)
    assert (cold.inner.status == Status.CONVERGED).all()
    assert (cold.inner.steps > 1).all()
    assert not warm.inner.steps.any()  # already at the solution
    assert not warm.linear.steps.any()
    for key, gradient in cold.params.items():
        torch.testing.assert_close(warm.params[key], gradient, rtol=1e-7, atol=1e-9)


def test_adapt_starts_at_the_given_phi_until_there_is_a_last_one():
    problem = regression(3)
    solver = External(lambda problem: problem.start())
    start = {name: torch.randn(3, *t.shape).double() for name, t in problem.params.items()}
    call = (problem.loss, problem.params, problem.support)
    settings = {"lam": 1.0, "inner": solver, "start": start, "warn": False}
    phi = adapt(*call, **settings)
    moved = WarmStart()
    moved.phi = problem.layout.flatten(start) + 1
    later = adapt(*call, **settings, warm_start=moved)
    for name, rows in start.items():
        assert torch.equal(phi[name], rows)
        torch.testing.assert_close(later[name], rows + 1)
    with pytest.raises(ValueError, match="start must have 3 tasks"):
        adapt(*call, **settings | {"start": {name: rows[:2] for name, rows in start.items()}})


@pytest.mark.parametrize("linear", [CG, MINRES(max_iter=100, rtol=1e-10)], ids=["cg", "minres"])
def test_a_warm_call_with_another_lam_gives_the_cold_result_in_fewer_steps(linear, device):
    problem = regression(3, device)
    call = (problem.loss, problem.params, problem.support, problem.query)
    inner = GradientDescent(lr=0.2, steps=200, momentum=0.5, tol=1e-8)
    settings = {"inner": inner, "linear": linear}
    last = implicit_meta_grad(*call, lam=1.0, **settings)
    lam = torch.tensor(1.001, dtype=torch.float64, device=device)
    cold = implicit_meta_grad(*call, lam=lam, **settings)
    warm = implicit_meta_grad(*call, lam=lam, start=last.adapted, x0=last.linear.value, **settings)
    assert (warm.inner.status == Status.CONVERGED).all()
    assert (warm.linear.status == Status.CONVERGED).all()
    assert (warm.inner.steps < cold.inner.steps).all()
    assert (warm.linear.steps < cold.linear.steps).all()
    torch.testing.assert_close(warm.lam, cold.lam, rtol=1e-6, atol=1e-9)
    for key, gradient in cold.params.items():
        torch.testing.assert_close(warm.params[key], gradient, rtol=1e-6, atol=1e-8)


def test_an_external_solver_receives_the_start_whole_and_task_by_task(device):
    problem = regression(3, device)
    start = torch.randn(3, problem.layout.dim, dtype=torch.float64, device=device)
    seen = []

    def solve(inner):
        seen.append(inner.start())
        seen.append(torch.cat([one.start() for one in inner.one_by_one()]))
        return inner.start()

    implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.0,
        inner=External(solve), start=problem.layout.unflatten(start),
    )  # fmt: skip
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[1], start)


def test_a_task_that_is_not_finite_starts_at_theta(device):
    problem = regression(3, device)
    call = (problem.loss, problem.params, problem.support, problem.query)
    out = implicit_meta_grad(*call, lam=1.0, inner=GradientDescent(lr=0.1, steps=5))
    start = {name: t.clone() for name, t in out.adapted.items()}
    next(iter(start.values()))[1] = torch.nan
    x0 = out.linear.value.clone()
    x0[1] = torch.inf
    got = implicit_meta_grad(
        *call, lam=1.0, inner=GradientDescent(lr=0.1, steps=5), start=start, x0=x0
    )
    for name, rows in got.adapted.items():
        assert torch.equal(rows[1], out.adapted[name][1])
        assert not torch.equal(rows[0], out.adapted[name][0])


# ---- adapt


def test_adapt_with_a_warm_start_follows_the_hyperparameters():
    # The closed form is the oracle of every step of an outer descent.
    warm_start, cold_steps, warm_steps = WarmStart(), [], []
    theta, (x, y), (qx, qy) = learned(), data(), data()
    log_lam = torch.tensor(LAM, dtype=torch.float64).log().requires_grad_()
    inner = GradientDescent(lr=0.1, steps=400, momentum=0.7, tol=1e-11)
    linear = ConjugateGradient(max_iter=30, rtol=1e-12)

    def counting(steps):
        class Counting(GradientDescent):
            def solve(self, problem):
                solution = super().solve(problem)
                steps.append(solution.steps.sum().item())
                return solution

        return Counting(lr=inner.lr, steps=inner.steps, momentum=inner.momentum, tol=inner.tol)

    for _ in range(3):
        for given, steps in ((None, cold_steps), (warm_start, warm_steps)):
            phi = adapt(
                fit, theta, (x, y), lam=log_lam.exp(), inner=counting(steps), linear=linear,
                warm_start=given,
            )  # fmt: skip
            value = vmap(fit)(phi, (qx, qy)).mean()
            exact = sum(
                (c @ ridge(a, b, theta["w"], log_lam.exp()) - d).square().mean() / 3
                for a, b, c, d in zip(x, y, qx, qy, strict=True)
            )
            assert_same_gradients(value, exact, [theta["w"], log_lam])
        with torch.no_grad():
            log_lam -= 0.001
    assert warm_steps[0] == cold_steps[0]
    assert sum(warm_steps[1:]) < 0.7 * sum(cold_steps[1:])


def test_a_warm_start_keeps_the_solutions_of_both_solves_until_it_is_reset():
    warm_start, theta, support = WarmStart(), learned(), data()
    assert warm_start.phi is None
    phi = adapt(fit, theta, support, lam=LAM, warm_start=warm_start, warn=False)
    assert torch.equal(warm_start.phi, phi["w"])
    assert not warm_start.phi.requires_grad
    assert warm_start.x is None
    phi["w"].sum().backward()
    assert warm_start.x.shape == phi["w"].shape
    warm_start.reset()
    again = adapt(fit, theta, support, lam=LAM, warm_start=warm_start)
    assert torch.equal(again["w"], phi["w"])


def test_a_failed_task_does_not_spoil_the_next_call():
    warm_start, theta, (x, y) = WarmStart(), learned(), data()
    bad = y.clone()
    bad[1] = torch.nan
    phi = adapt(fit, theta, (x, bad), lam=LAM, warm_start=warm_start, warn=False)
    phi["w"].sum().backward()
    assert theta["w"].grad.isnan().all()
    theta["w"].grad = None
    linear = ConjugateGradient(max_iter=30, rtol=1e-12)
    inner = GradientDescent(lr=0.1, steps=300, momentum=0.7)
    settings = {"lam": LAM, "inner": inner, "linear": linear}
    phi = adapt(fit, theta, (x, y), warm_start=warm_start, **settings)
    fresh = adapt(fit, theta, (x, y), **settings)
    torch.testing.assert_close(phi["w"], fresh["w"])
    (got,) = torch.autograd.grad(phi["w"].square().sum(), theta["w"])
    (want,) = torch.autograd.grad(fresh["w"].square().sum(), theta["w"])
    torch.testing.assert_close(got, want)


def test_a_warm_start_of_other_tasks_is_refused():
    warm_start = WarmStart()
    adapt(fit, learned(), data(), lam=LAM, warm_start=warm_start)
    with pytest.raises(ValueError, match=r"warm_start has solutions \[3, 4\].*need \[5, 4\]"):
        adapt(fit, learned(), data(tasks=5), lam=LAM, warm_start=warm_start)
    small = tuple(t.float() for t in data())
    with pytest.raises(ValueError, match=r"need \[3, 4\] torch.float32"):
        adapt(fit, {"w": torch.zeros(4)}, small, lam=LAM, warm_start=warm_start)


PHI = {"w": torch.zeros(3, 4).double()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": {"w": torch.zeros(2, 4)}}, r"start.* is torch.float32"),
        ({"start": {"w": torch.zeros(2, 4).double()}}, "start must have 3 tasks"),
        ({"start": {"w": torch.zeros(4).double()}}, "start must have 3 tasks"),
        ({"start": {"v": torch.zeros(3, 4).double()}}, "start must name"),
        ({"x0": torch.zeros(3, 5).double()}, r"x0 must be \[3, 4\]"),
        ({"start": PHI, "adapted": PHI}, "adapted skips the inner solve"),
    ],
)
def test_an_invalid_start_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        implicit_meta_grad(fit, {"w": torch.zeros(4).double()}, data(), data(), lam=1.0, **change)


@pytest.mark.parametrize("linear", [CG, MINRES(max_iter=100, rtol=1e-10)], ids=["cg", "minres"])
def test_an_inaccurate_phi_is_reported_where_x_starts_at_the_solution(linear):
    inner = GradientDescent(lr=0.01, steps=1)
    params, support, warm_start = learned(), data(), WarmStart()
    settings = {"lam": 0.01, "inner": inner, "linear": linear, "warm_start": warm_start}
    phi = adapt(fit, params, support, **settings)["w"]
    for _ in range(3):  # from the second on, no product is computed
        with pytest.warns(ConvergenceWarning, match="adapt has not converged"):
            phi.sum().backward(retain_graph=True)
    accurate = adapt(fit, params, support, **settings | {"inner": SOLVERS["lbfgs"]})["w"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        for _ in range(3):
            accurate.sum().backward(retain_graph=True)
