"""Solvers with a line search, Hessian-free and L-BFGS: decrease, convergence and step lengths."""

from dataclasses import replace

import pytest
import torch
from inner_problems import gradient_norms, setting
from problems import classification, regression

from imaml_ext import LBFGS, Backtracking, ConjugateGradient, HessianFree, Status
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal


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
