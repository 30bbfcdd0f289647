"""Inner solvers against torch.optim, SciPy and the optimality condition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from inner_problems import LAMS, gradient_norms, proximal_loss, setting
from problems import regression
from scipy.optimize import minimize

from imaml_ext import (
    LBFGS,
    Adam,
    Backtracking,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    Status,
    implicit_meta_grad,
)
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal

CONVERGING = {
    "gradient descent": GradientDescent(lr=0.1, steps=3000, tol=1e-8),
    "momentum": GradientDescent(lr=0.05, steps=3000, momentum=0.8, tol=1e-8),
    "accelerated": GradientDescent.accelerated(lr=0.1, steps=3000, strong_convexity=1.0, tol=1e-8),
    "adam": Adam(lr=0.01, steps=6000, tol=1e-8),
    "hessian-free": HessianFree(steps=60, tol=1e-8),
    "hessian-free, Hessian": HessianFree(
        steps=60, linear=ConjugateGradient(max_iter=10), damping=0.0, tol=1e-8
    ),
    "lbfgs": LBFGS(steps=200, tol=1e-8),
    "lbfgs, a history of one": LBFGS(steps=400, history=1, tol=1e-8),
}


@pytest.mark.parametrize("form", LAMS)
@pytest.mark.parametrize("solver", CONVERGING.values(), ids=list(CONVERGING))
def test_every_solver_reaches_the_optimum_found_by_scipy(solver, form, device):
    problem, proximal = setting(device, 3, form)
    got = solver.solve(proximal)
    assert (got.status == Status.CONVERGED).all()
    assert (gradient_norms(problem, proximal, got.value) <= 1.01e-8).all()
    for task in range(3):

        def value_and_gradient(x, task=task):
            phi = torch.from_numpy(x).to(device).requires_grad_()
            value = proximal_loss(problem, proximal, task, phi)
            (gradient,) = torch.autograd.grad(value, phi)
            return value.item(), gradient.cpu().numpy()

        best = minimize(
            value_and_gradient, got.value[task].cpu().numpy() * 0.9, jac=True, method="BFGS",
            options={"gtol": 1e-9},
        )  # fmt: skip
        np.testing.assert_allclose(got.value[task].cpu().numpy(), best.x, atol=1e-6)


@pytest.mark.parametrize("solver", CONVERGING.values(), ids=list(CONVERGING))
def test_a_nonfinite_task_does_not_change_the_others(solver, device):
    problem, proximal = setting(device, 16)
    support = tuple(t.clone() for t in problem.support)
    support[1][5] = torch.nan
    objective = Objective(problem.loss, problem.layout, support)
    got = solver.solve(Proximal(objective, proximal.theta, proximal.lam.values))
    clean = solver.solve(proximal)
    others = torch.arange(16, device=device) != 5
    assert got.status[5] == Status.NONFINITE
    assert torch.equal(got.status[others], clean.status[others])
    assert torch.equal(got.steps[others], clean.steps[others])
    torch.testing.assert_close(got.value[others], clean.value[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", CONVERGING.values(), ids=list(CONVERGING))
def test_a_single_task_with_a_single_parameter_is_solved(solver, dtype, device):
    params = {"w": torch.zeros((), dtype=dtype, device=device)}
    layout = Layout(params)
    x = torch.tensor([[1.0, 2.0]], dtype=dtype, device=device)

    def loss(params, data):
        return ((params["w"] - data) ** 2).mean()

    objective = Objective(loss, layout, x)
    proximal = Proximal(objective, layout.flatten(params), x.new_full((1,), 1.0))
    if isinstance(solver, HessianFree):  # ggn needs module_loss
        solver = HessianFree(steps=60, linear=ConjugateGradient(max_iter=5))
    got = replace(solver, tol=1e-5 if dtype == torch.float32 else 1e-8).solve(proximal)
    assert got.status.item() == Status.CONVERGED
    # 2 (w - 1.5) + w = 0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(got.value[0, 0].item(), 1.0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", CONVERGING.values(), ids=list(CONVERGING))
def test_zero_steps_return_theta(solver, device):
    _, proximal = setting(device)
    got = replace(solver, steps=0).solve(proximal)
    assert torch.equal(got.value, proximal.theta.expand(4, -1))
    assert (got.steps == 0).all()


# ---- gradient descent


@pytest.mark.parametrize("form", LAMS)
@pytest.mark.parametrize(
    "momentum", [{}, {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}], ids=str
)
def test_gradient_descent_agrees_with_torch_sgd_for_each_task(momentum, form, device):
    problem, proximal = setting(device, form=form)
    got = GradientDescent(lr=0.05, steps=7, **momentum).solve(proximal)
    assert_agrees(torch.optim.SGD, {"lr": 0.05, **momentum}, 7, problem, proximal, got.value)


def assert_agrees(optimizer, settings, steps, problem, proximal, value):
    for task in range(problem.tasks):
        phi = proximal.theta.clone().requires_grad_()
        stepping = optimizer([phi], **settings)
        for _ in range(steps):
            stepping.zero_grad()
            proximal_loss(problem, proximal, task, phi).backward()
            stepping.step()
        torch.testing.assert_close(value[task], phi.detach())


def test_each_task_stops_when_it_reaches_the_tolerance(device):
    problem, proximal = setting(device)
    got = GradientDescent(lr=0.1, steps=500, tol=1e-6).solve(proximal)
    assert (got.status == Status.CONVERGED).all()
    assert got.steps.unique().numel() > 1
    assert (gradient_norms(problem, proximal, got.value) <= 1e-6).all()
    for task in range(4):  # but not one step earlier
        fewer = GradientDescent(lr=0.1, steps=int(got.steps[task]) - 1)
        earlier = fewer.solve(proximal).value
        assert gradient_norms(problem, proximal, earlier)[task] > 1e-6


def test_accelerated_descent_agrees_with_nesterovs_scheme(device):
    problem, proximal = setting(device)
    mu, lr = 1.5, 0.05
    got = GradientDescent.accelerated(lr=lr, steps=9, strong_convexity=mu).solve(proximal)
    # Scheme 2.2.11 of Nesterov 2004: y is the extrapolated point.
    kappa = 1 / (lr * mu)
    factor = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    for task in range(4):
        x = y = proximal.theta
        for _ in range(9):
            leaf = y.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(proximal_loss(problem, proximal, task, leaf), leaf)
            x, last = y - lr * gradient, x
            y = x + factor * (x - last)
        torch.testing.assert_close(got.value[task], y)


# ---- Adam


@pytest.mark.parametrize("form", LAMS)
def test_adam_agrees_with_torch_adam_for_each_task(form, device):
    problem, proximal = setting(device, form=form)
    got = Adam(lr=0.05, steps=6, betas=(0.8, 0.99), eps=1e-6).solve(proximal)
    settings = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6}
    assert_agrees(torch.optim.Adam, settings, 6, problem, proximal, got.value)


def test_the_second_moment_of_adam_agrees_with_torch(device):
    problem, proximal = setting(device, 1)
    got = Adam(lr=0.05, steps=3).solve(proximal)
    phi = proximal.theta.clone().requires_grad_()
    adam = torch.optim.Adam([phi], lr=0.05)
    for _ in range(3):
        adam.zero_grad()
        proximal_loss(problem, proximal, 0, phi).backward()
        adam.step()
    want = adam.state[phi]["exp_avg_sq"] / (1 - 0.999**3)
    torch.testing.assert_close(got.second_moment[0], want)


def test_the_adam_preconditioner_gives_the_same_meta_gradient(device):
    problem = regression(3, device)
    out = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.5,
        inner=Adam(lr=0.05, steps=6000, tol=1e-10),
        linear=ConjugateGradient(max_iter=200, rtol=1e-11, preconditioner="adam"),
    )  # fmt: skip
    want = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.5,
        inner=GradientDescent(lr=0.1, steps=3000, tol=1e-10),
        linear=ConjugateGradient(max_iter=200, rtol=1e-11),
    )  # fmt: skip
    assert (out.linear.status == Status.CONVERGED).all()
    for name in problem.params:
        torch.testing.assert_close(out.params[name], want.params[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(lr=0.0), "lr must be positive and finite, got 0.0"),
        (lambda: GradientDescent(lr=float("nan")), "lr must be positive"),
        (lambda: GradientDescent(steps=-1), "steps must be at least 0, got -1"),
        (lambda: GradientDescent(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: GradientDescent(nesterov=True), "nesterov needs a positive momentum"),
        (lambda: GradientDescent(tol=-1.0), r"tol must be in \[0, inf\], got -1.0"),
        (
            lambda: GradientDescent.accelerated(lr=1.0, steps=3, strong_convexity=2.0),
            r"lr \* strong_convexity must be in \(0, 1\)",
        ),
        (
            lambda: GradientDescent.accelerated(lr=0.1, steps=3, strong_convexity=float("nan")),
            "strong_convexity must be positive and finite, got nan",
        ),
        (
            lambda: GradientDescent(momentum=0.5, nesterov="no"),
            "nesterov must be one of False, True, got 'no'",
        ),
        (lambda: Adam(betas=0.9), r"betas must be two numbers in \[0, 1\), got 0.9"),
        (lambda: Adam(betas=None), "betas must be two numbers"),
        (lambda: External(lambda problem: 0, tol=-1.0), r"tol must be in \[0, inf\], got -1.0"),
        (
            lambda: HessianFree(linear=ConjugateGradient(preconditioner="adam")),
            "preconditioner='adam' needs inner=Adam",
        ),
        (lambda: ConjugateGradient(probes=3), "probes=3 needs preconditioner='jacobi'"),
        (lambda: Adam(lr=-1.0), "lr must be positive"),
        (lambda: Adam(betas=(0.9, 1.0)), r"each of betas must be in \[0, 1\)"),
        (lambda: Adam(eps=-1.0), r"eps must be in \[0, inf\], got -1.0"),
        (lambda: HessianFree(steps=-1), "steps must be at least 0"),
        (lambda: HessianFree(damping=-1.0), "damping must be finite and non-negative"),
        (lambda: LBFGS(history=0), "history must be at least 1, got 0"),
        (lambda: Backtracking(trials=0), "trials must be at least 1, got 0"),
        (lambda: Backtracking(shrink=1.0), r"shrink must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(lr=torch.tensor(0.1)), "lr must be a number, got tensor"),
        (
            lambda: GradientDescent.accelerated(lr="x", steps=3, strong_convexity=1.0),
            "lr must be a number, got 'x'",
        ),
        (lambda: LBFGS(line_search="strong_wolfe"), "line_search must be .* Backtracking, got str"),
        (lambda: HessianFree(line_search=None), "line_search must be .* Backtracking, got None"),
        (lambda: HessianFree(linear="cg"), "linear must be .* LinearSolver, got str"),
        (lambda: External("scipy"), r"fn must be a function of \(problem\), got str"),
        (lambda: External(torch.optim.LBFGS), "got the class LBFGS"),
        (lambda: External(lambda: 0), r"got <lambda>\(\)"),
        (lambda: External(lambda problem: 0, tol="x"), "tol must be a number, got 'x'"),
    ],
)
def test_settings_of_another_type_are_rejected(make, message):
    with pytest.raises(TypeError, match=message):
        make()
