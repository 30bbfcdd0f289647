"""Inner solvers against torch.optim, SciPy and the optimality condition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import classification, regression
from scipy.optimize import minimize

from imaml_ext import (
    IMAML,
    LBFGS,
    Adam,
    Backtracking,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    Status,
    adapt,
    implicit_meta_grad,
)
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal

LAMS = ["scalar", "diagonal", "dense"]


def make_lam(form, theta):
    if form == "scalar":
        return torch.full((1,), 1.5, dtype=theta.dtype, device=theta.device)
    if form == "diagonal":
        return 1 + torch.rand_like(theta)
    root = torch.randn(len(theta), len(theta), dtype=theta.dtype, device=theta.device)
    return torch.eye(len(theta), dtype=theta.dtype, device=theta.device) + root @ root.T / len(
        theta
    )


def setting(device, tasks=4, form="scalar", make=regression):
    problem = make(tasks, device)
    theta = problem.layout.flatten(problem.params)
    objective = Objective(problem.loss, problem.layout, problem.support)
    return problem, Proximal(objective, theta, make_lam(form, theta))


def proximal_loss(problem, proximal, task, phi):
    """G of one task, from its definition."""
    data = tuple(t[task] for t in problem.support)
    displacement, lam = phi - proximal.theta, proximal.lam.values
    pull = lam @ displacement if lam.dim() == 2 else lam * displacement
    return problem.flat_loss(phi, data) + 0.5 * displacement @ pull


def gradient_norms(problem, proximal, phi):
    norms = []
    for task, row in enumerate(phi):
        leaf = row.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(proximal_loss(problem, proximal, task, leaf), leaf)
        norms.append(gradient.norm())
    return torch.stack(norms)


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


# ---- Hessian-free and L-BFGS


@pytest.mark.parametrize("make", [regression, classification])
@pytest.mark.parametrize(
    "solver", [HessianFree(steps=8), LBFGS(steps=8)], ids=["hessian-free", "lbfgs"]
)
def test_every_step_with_a_line_search_decreases_the_objective(solver, make, device):
    _, proximal = setting(device, make=make)
    values = [proximal.values(proximal.start())]
    for steps in range(1, 9):
        values.append(proximal.values(replace(solver, steps=steps).solve(proximal).value))
    values = torch.stack(values)
    assert (values.diff(dim=0) <= 1e-14).all()
    assert (values[-1] < values[0]).all()


def test_a_task_without_a_descent_direction_does_not_stop_the_others(device):
    params = {"w": torch.full((3,), 0.5, dtype=torch.float64, device=device)}
    layout = Layout(params)

    def loss(params, sign):  # the gradient has the wrong sign where sign is -1
        square = ((params["w"] - 1) ** 2).sum()
        return sign * square + (1 - sign) * square.detach()

    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64, device=device)
    proximal = Proximal(Objective(loss, layout, sign), layout.flatten(params), sign.new_ones(1))
    got = LBFGS(steps=30, tol=1e-9).solve(proximal)
    assert got.status[[0, 2]].tolist() == [Status.CONVERGED] * 2
    assert got.status[1] != Status.CONVERGED
    torch.testing.assert_close(got.value[1], proximal.theta, rtol=0, atol=1e-6)
    # 2 (w - 1) + (w - 1/2) = 0
    torch.testing.assert_close(got.value[0], torch.full_like(proximal.theta, 2.5 / 3))


@pytest.mark.parametrize("stiffness", [1e2, 1e4, 1e6])
def test_lbfgs_finds_the_step_length_on_a_stiff_quadratic(stiffness, device):
    params = {"w": torch.zeros(5, dtype=torch.float64, device=device)}
    layout = Layout(params)

    def loss(params, target):
        return 0.5 * stiffness * ((params["w"] - target) ** 2).sum()

    target = torch.full((2, 5), 1e-3, dtype=torch.float64, device=device)
    proximal = Proximal(Objective(loss, layout, target), layout.flatten(params), target.new_ones(1))
    got = LBFGS(steps=100, tol=1e-6).solve(proximal)
    assert (got.status == Status.CONVERGED).all()
    torch.testing.assert_close(got.value, target * stiffness / (stiffness + 1))


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_hessian_free_adapts_its_damping_where_newton_overshoots(damping, device):
    # log cosh: its curvature vanishes far from 0, and Newton's step has length e^80.
    params = {"w": torch.full((1,), 40.0, dtype=torch.float64, device=device)}
    layout = Layout(params)

    def loss(params, data):
        return (torch.nn.functional.softplus(2 * params["w"]) - params["w"]).sum() + 0 * data.sum()

    data = torch.zeros(1, 1, dtype=torch.float64, device=device)
    lam = torch.full((1,), 1e-6, dtype=torch.float64, device=device)
    proximal = Proximal(Objective(loss, layout, data), layout.flatten(params), lam)
    cg = ConjugateGradient(max_iter=5)
    got = HessianFree(steps=200, linear=cg, damping=damping, tol=1e-8).solve(proximal)
    assert got.status.item() == Status.CONVERGED


@pytest.mark.parametrize(
    "solver", [HessianFree(steps=40), LBFGS(steps=100)], ids=["hessian-free", "lbfgs"]
)
def test_a_line_search_in_float32_converges_to_rounding_error(solver, device):
    problem = regression(4, device).to(torch.float32)
    theta = problem.layout.flatten(problem.params)

    def loss(params, data):  # the offset makes the last decreases of G round to 0
        return problem.loss(params, data) + 100.0

    lam = torch.full((1,), 1.5, device=device)
    if isinstance(solver, HessianFree):
        solver = HessianFree(steps=40, linear=ConjugateGradient(max_iter=10))
    got = solver.solve(Proximal(Objective(loss, problem.layout, problem.support), theta, lam))
    assert (
        gradient_norms(
            problem,
            Proximal(Objective(problem.loss, problem.layout, problem.support), theta, lam),
            got.value,
        )
        < 2e-3
    ).all()


def test_a_longer_history_makes_lbfgs_converge_in_fewer_steps(device):
    # With D pairs of exact curvature, L-BFGS nearly solves a quadratic of D parameters.
    eigenvalues = torch.logspace(0, 3, 6, dtype=torch.float64, device=device)
    params = {"w": torch.ones(6, dtype=torch.float64, device=device)}
    layout = Layout(params)

    def loss(params, data):
        return 0.5 * (eigenvalues * params["w"] ** 2).sum() + 0 * data.sum()

    data = torch.zeros(1, 1, dtype=torch.float64, device=device)
    lam = torch.full((1,), 1e-9, dtype=torch.float64, device=device)
    proximal = Proximal(Objective(loss, layout, data), layout.flatten(params), lam)
    long = LBFGS(steps=300, history=8, tol=1e-9).solve(proximal)
    short = LBFGS(steps=300, history=1, tol=1e-9).solve(proximal)
    assert long.status.item() == Status.CONVERGED
    assert long.steps.item() < 0.7 * short.steps.item()


def test_one_undamped_hessian_free_step_solves_a_quadratic(device):
    # The direction is Newton's, and the first trial is accepted.
    params = {"w": torch.randn(6, dtype=torch.float64, device=device)}
    layout = Layout(params)
    a = torch.randn(3, 8, 6, dtype=torch.float64, device=device)
    b = torch.randn(3, 8, dtype=torch.float64, device=device)

    def loss(params, data):
        a, b = data
        return ((a @ params["w"] - b) ** 2).sum() / 2

    proximal = Proximal(Objective(loss, layout, (a, b)), layout.flatten(params), a.new_ones(1))
    solver = HessianFree(steps=1, linear=ConjugateGradient(max_iter=50, rtol=1e-13), damping=0.0)
    got = solver.solve(proximal)
    eye = torch.eye(6, dtype=torch.float64, device=device)
    want = torch.linalg.solve(a.mT @ a + eye, (a.mT @ b[..., None])[..., 0] + params["w"])
    torch.testing.assert_close(got.value, want)


def test_hessian_free_converges_to_a_minimum_despite_negative_curvature(device):
    # At theta the loss is concave: Newton's step would go to the maximum.
    params = {"w": torch.full((4,), 0.1, dtype=torch.float64, device=device)}
    layout = Layout(params)

    def loss(params, data):
        return (torch.cos(3 * params["w"]) * data).sum()

    data = torch.rand(3, 4, dtype=torch.float64, device=device) + 0.5
    proximal = Proximal(Objective(loss, layout, data), layout.flatten(params), data.new_ones(1))
    solver = HessianFree(steps=40, linear=ConjugateGradient(max_iter=5), tol=1e-9)
    got = solver.solve(proximal)
    assert (got.status == Status.CONVERGED).all()
    hessian = torch.diag_embed(-9 * torch.cos(3 * got.value) * data + 1)
    assert (torch.linalg.eigvalsh(hessian) > 0).all()  # a minimum


def test_the_line_search_takes_the_first_length_with_sufficient_decrease(device):
    params = {"w": torch.zeros(2, dtype=torch.float64, device=device)}
    layout = Layout(params)

    def loss(params, data):
        return (data * params["w"] ** 2).sum() / 2 - params["w"].sum()

    curvature = torch.tensor([[1.0, 1.0], [7.0, 7.0], [1.0, 1.0]], dtype=torch.float64)
    problem = Proximal(
        Objective(loss, layout, curvature.to(device)), layout.flatten(params),
        torch.full((1,), 1e-9, dtype=torch.float64, device=device),
    )  # fmt: skip
    phi = problem.start()
    value, gradient = problem.value_and_gradient(phi)
    running = torch.tensor([True, True, False], device=device)
    moved, t, at_full = Backtracking().search(
        problem, phi, -gradient, value, -(gradient**2).sum(1), running
    )
    # Along d = (1, 1), G = curvature t² - 2 t: t = 1 suffices for 1, and t = 1/4 for 7.
    assert t.tolist() == [1.0, 0.25, 0.0]
    torch.testing.assert_close(moved, t[:, None] * -gradient)
    torch.testing.assert_close(at_full, problem.values(phi - gradient))


def test_the_line_search_accepts_an_increase_within_rounding_error(device):
    params = {"w": torch.zeros(1, device=device)}
    layout = Layout(params)

    def loss(params, data):  # at w = 1 larger by a unit in the last place
        return 100 + (1e-5 * params["w"]).sum() + 0 * data.sum()

    data = torch.zeros(1, 1, device=device)
    lam = torch.full((1,), 1e-9, device=device)
    problem = Proximal(Objective(loss, layout, data), layout.flatten(params), lam)
    phi = problem.start()
    derivative = torch.full((1,), -1e-9, dtype=torch.float64, device=device)
    _, t, at_full = Backtracking().search(
        problem, phi, torch.ones_like(phi), problem.values(phi), derivative, derivative < 0
    )
    assert at_full > 100
    assert t.item() == 1


# ---- External


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
