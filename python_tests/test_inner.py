"""Inner solvers against torch.optim and the optimality condition."""

import pytest
import torch
from problems import regression

from imaml_ext import GradientDescent, Status
from imaml_ext.objective import Objective


def setting(device, tasks=4):
    problem = regression(tasks, device)
    theta = problem.layout.flatten(problem.params)
    objective = Objective(problem.loss, problem.layout, problem.support)
    return problem, objective, theta, torch.full((1,), 1.5, dtype=theta.dtype, device=device)


@pytest.mark.parametrize(
    "momentum", [{}, {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}], ids=str
)
def test_gradient_descent_is_torch_sgd_task_by_task(momentum, device):
    problem, objective, theta, lam = setting(device)
    got = GradientDescent(lr=0.05, steps=7, **momentum).solve(objective, theta, lam)
    for task in range(problem.tasks):
        data = tuple(t[task] for t in problem.support)
        phi = theta.clone().requires_grad_()
        sgd = torch.optim.SGD([phi], lr=0.05, **momentum)
        for _ in range(7):
            sgd.zero_grad()
            loss = problem.flat_loss(phi, data) + 0.5 * lam[0] * ((phi - theta) ** 2).sum()
            loss.backward()
            sgd.step()
        torch.testing.assert_close(got.value[task], phi.detach())


def test_each_task_stops_at_its_own_tolerance(device):
    _, objective, theta, lam = setting(device)
    solver = GradientDescent(lr=0.1, steps=500, tol=1e-6)
    got = solver.solve(objective, theta, lam)
    assert (got.status == Status.CONVERGED).all()
    assert got.steps.unique().numel() > 1
    _, gradient = objective.gradient(got.value)
    norms = (gradient + lam * (got.value - theta)).norm(dim=1)
    assert (norms <= 1e-6).all()
    for task in range(4):  # one step earlier it had not arrived, and freezing took nothing away
        fewer = GradientDescent(lr=0.1, steps=int(got.steps[task]) - 1)
        earlier = fewer.solve(objective, theta, lam).value
        _, gradient = objective.gradient(earlier)
        assert (gradient + lam * (earlier - theta)).norm(dim=1)[task] > 1e-6


def test_an_exploding_task_freezes_and_says_so(device):
    problem, _, theta, lam = setting(device)
    support = tuple(t.clone() for t in problem.support)
    support[1][2] = 1e200
    objective = Objective(problem.loss, problem.layout, support)
    got = GradientDescent(lr=0.1, steps=20, tol=0.0).solve(objective, theta, lam)
    assert got.status[2] == Status.NONFINITE
    alone = Objective(problem.loss, problem.layout, problem.support)
    clean = GradientDescent(lr=0.1, steps=20).solve(alone, theta, lam)
    others = [0, 1, 3]
    torch.testing.assert_close(got.value[others], clean.value[others])


def test_no_steps_stay_at_theta(device):
    _, objective, theta, lam = setting(device)
    got = GradientDescent(steps=0).solve(objective, theta, lam)
    assert torch.equal(got.value, theta.expand(4, -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"nesterov": True}, "nesterov needs a positive momentum"),
        ({"tol": -1.0}, "tol must not be negative, got -1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientDescent(**settings)
