"""The proximal objective against its definition, task by task."""

import pytest
import torch
from problems import regression

from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal


def lam_values(form, dim, device):
    if form == "scalar":
        return torch.full((1,), 1.5, dtype=torch.float64, device=device)
    if form == "diagonal":
        return torch.rand(dim, dtype=torch.float64, device=device) + 0.5
    root = torch.randn(dim, dim, dtype=torch.float64, device=device)
    return torch.eye(dim, dtype=torch.float64, device=device) + root @ root.T / dim


@pytest.fixture(params=["scalar", "diagonal", "dense"])
def setting(request, device):
    problem = regression(4, device)
    theta = problem.layout.flatten(problem.params)
    values = lam_values(request.param, len(theta), device)
    objective = Objective(problem.loss, problem.layout, problem.support)
    matrix = values if values.dim() == 2 else torch.diag(values.expand(len(theta)))
    return problem, Proximal(objective, theta, values), matrix


def value_and_gradient(problem, matrix, task, row):
    data = tuple(t[task] for t in problem.support)
    leaf = row.detach().clone().requires_grad_()
    displacement = leaf - problem.layout.flatten(problem.params)
    value = problem.flat_loss(leaf, data) + 0.5 * displacement @ matrix @ displacement
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def test_values_gradients_and_residuals_agree_with_the_definition(setting):
    problem, proximal, matrix = setting
    phi = proximal.start() + torch.randn_like(proximal.start())
    values, gradients = proximal.value_and_gradient(phi)
    residual = proximal.residual(phi, proximal.objective.gradient(phi)[1])
    assert values.dtype == residual.dtype == torch.float64
    for task in range(4):
        value, gradient = value_and_gradient(problem, matrix, task, phi[task])
        torch.testing.assert_close(values[task], value)
        torch.testing.assert_close(gradients[task], gradient)
        torch.testing.assert_close(residual[task], gradient.norm())
    torch.testing.assert_close(proximal.values(phi), values)


def test_every_task_starts_at_a_copy_of_theta(setting):
    _, proximal, _ = setting
    theta = proximal.theta.clone()
    phi = proximal.start()
    assert torch.equal(phi, theta.expand(4, -1))
    phi.zero_()
    assert torch.equal(proximal.theta, theta)


def test_single_tasks_are_the_rows_of_the_batch(setting):
    _, proximal, _ = setting
    phi = proximal.start() + torch.randn_like(proximal.start())
    values, gradients = proximal.value_and_gradient(phi)
    ones = list(proximal.one_by_one())
    assert len(ones) == 4
    for task, one in enumerate(ones):
        assert one.tasks == 1
        value, gradient = one.value_and_gradient(phi[task : task + 1])
        torch.testing.assert_close(value, values[task : task + 1])
        torch.testing.assert_close(gradient, gradients[task : task + 1])
