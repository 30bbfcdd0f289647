"""External inner solvers: any function of the problem gives the same meta-gradient."""

import pytest
import torch
from inner_problems import setting
from problems import regression
from scipy.optimize import minimize

from imaml_ext import (
    IMAML,
    ConjugateGradient,
    External,
    GradientDescent,
    Status,
    adapt,
    implicit_meta_grad,
)


def test_an_external_solver_may_use_autograd(device):
    problem = regression(2, device)
    params = {name: t.clone().requires_grad_() for name, t in problem.params.items()}

    def sgd(proximal):
        phi = proximal.start().requires_grad_()
        optimizer = torch.optim.SGD([phi], lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            displacement = phi - proximal.theta
            total = proximal.objective.losses(phi).sum() + 0.75 * (displacement**2).sum()
            total.backward()
            optimizer.step()
        proximal.theta.zero_()  # a copy
        return phi

    own, ours = External(sgd), GradientDescent(lr=0.1, steps=20)
    settings = {"lam": 1.5, "linear": ConjugateGradient(max_iter=20)}
    got, want = (
        implicit_meta_grad(
            problem.loss, params, problem.support, problem.query, inner=inner, **settings
        )
        for inner in (own, ours)
    )
    phi = adapt(problem.loss, params, problem.support, inner=own, **settings)
    evaluated = IMAML(problem.loss, params, lam=1.5, inner=own).adapt(problem.support)
    for name in params:
        torch.testing.assert_close(got.params[name], want.params[name])
        torch.testing.assert_close(phi[name].detach(), want.adapted[name])
        torch.testing.assert_close(evaluated[name], want.adapted[name])


def scipy_task_by_task(problem):
    rows = []
    for one in problem.one_by_one():

        def value_and_gradient(x, one=one):
            phi = torch.from_numpy(x)[None].to(one.theta)
            value, gradient = one.value_and_gradient(phi)
            return value.item(), gradient[0].double().cpu().numpy()

        found = minimize(value_and_gradient, one.theta.double().cpu().numpy(), jac=True, tol=1e-12)
        rows.append(torch.from_numpy(found.x))
    return torch.stack(rows).to(problem.theta)


def random_search(problem):
    """Random trials in a shrinking neighbourhood of the best point."""
    generator = torch.Generator().manual_seed(0)
    best = problem.start()
    value, width = problem.values(best), torch.ones(problem.tasks, 1)
    for _ in range(4000):
        noise = torch.randn(best.shape, generator=generator, dtype=best.dtype)
        tried = best + (width * noise).to(best)
        tried_value = problem.values(tried)
        better = tried_value < value
        best = torch.where(better[:, None], tried, best)
        value = torch.where(better, tried_value, value)
        width = width * torch.where(better.cpu(), 1.5, 0.93)[:, None]
    return problem.layout.unflatten(best)


@pytest.mark.parametrize(("fn", "tolerance"), [(scipy_task_by_task, 1e-6), (random_search, 0.05)])
def test_an_external_solver_gives_the_same_meta_gradient(fn, tolerance, device):
    problem = regression(3, device)
    small = {name: t[:1] if name == "0.bias" else t for name, t in problem.params.items()}
    del small["0.bias"], small["0.weight"]  # the last layer only: convex, D = 7
    problem.loss.model.requires_grad_(False)
    settings = {"lam": 1.5, "linear": ConjugateGradient(max_iter=50, rtol=1e-12)}
    want = implicit_meta_grad(
        problem.loss, small, problem.support, problem.query,
        inner=GradientDescent(lr=0.1, steps=3000, tol=1e-12), **settings,
    )  # fmt: skip
    got = implicit_meta_grad(
        problem.loss, small, problem.support, problem.query, inner=External(fn), **settings
    )
    assert (got.inner.status == Status.MAX_ITER).all()
    for name in small:
        distance = (got.params[name] - want.params[name]).norm() / want.params[name].norm()
        assert distance < tolerance
    error = (got.inner.value - want.inner.value).norm(dim=1)
    assert (error <= 1.01 * got.inner.error_estimate + 1e-12).all()  # an upper bound here


def test_the_status_of_an_external_solver_follows_from_its_tolerance(device):
    problem = regression(3, device)

    def lazy(proximal):
        phi = scipy_task_by_task(proximal)
        phi[1] = proximal.theta
        return phi

    got = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.5,
        inner=External(lazy, tol=1e-3),
    )  # fmt: skip
    assert got.inner.status.tolist() == [Status.CONVERGED, Status.MAX_ITER, Status.CONVERGED]


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda p: p.start()[:1], ValueError, r"must return \[4, 25\] torch.float64"),
        (lambda p: p.start().float(), ValueError, r"got \[4, 25\] torch.float32"),
        (lambda p: 3.0, TypeError, "must return a tensor or a dict, got float"),
        (lambda p: {"w": p.start()}, ValueError, "phi must name"),
    ],
)
def test_an_external_solver_must_return_phi(fn, error, message):
    _, proximal = setting("cpu")
    with pytest.raises(error, match=message):
        External(fn).solve(proximal)
