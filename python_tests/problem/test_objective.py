"""Batched losses, gradients and curvature products against torch.func, one task at a time."""

import pytest
import torch
from problems import classification, outputs, regression
from torch.func import grad, jacrev

from imaml_ext import module_loss
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective


def rows_of(problem):
    return torch.randn(problem.tasks, problem.layout.dim, dtype=torch.float64).to(
        problem.layout.device
    )


@pytest.mark.parametrize("make", [regression, classification])
def test_losses_and_gradients_agree_with_torch_func_for_each_task(make, device):
    problem = make(5, device)
    rows = rows_of(problem)
    losses, gradient = Objective(problem.loss, problem.layout, problem.support).gradient(rows)
    for task in range(5):
        data = tuple(t[task] for t in problem.support)
        torch.testing.assert_close(losses[task], problem.flat_loss(rows[task], data))
        torch.testing.assert_close(gradient[task], grad(problem.flat_loss)(rows[task], data))


@pytest.mark.parametrize("make", [regression, classification])
def test_hessian_products_agree_with_a_dense_hessian(make, device):
    problem = make(3, device)
    rows, vector = rows_of(problem), rows_of(problem)
    objective = Objective(problem.loss, problem.layout, problem.support)
    at = objective.linearise(rows, "hessian")
    want = (problem.hessians(rows) @ vector[..., None])[..., 0]
    torch.testing.assert_close(at.matvec(vector), want)
    torch.testing.assert_close(at.matvec(vector), want)  # the graph is not freed
    torch.testing.assert_close(at.gradient, objective.gradient(rows)[1])
    assert not at.matvec(vector).requires_grad


@pytest.mark.parametrize("make", [regression, classification])
def test_gauss_newton_products_agree_with_a_dense_matrix(make, device):
    problem = make(3, device)
    rows, vector = rows_of(problem), rows_of(problem)
    objective = Objective(problem.loss, problem.layout, problem.support)
    at = objective.linearise(rows, "ggn")
    for task in range(3):
        x, y = (t[task] for t in problem.support)
        z = outputs(problem, rows[task], x)
        jacobian = jacrev(lambda row, x=x: outputs(problem, row, x))(rows[task])
        jacobian = jacobian.reshape(-1, rows.shape[1])
        outer = jacrev(grad(lambda z, y=y: problem.loss.criterion(z, y)))(z)
        matrix = jacobian.T @ outer.reshape(z.numel(), -1) @ jacobian
        torch.testing.assert_close(at.matvec(vector)[task], matrix @ vector[task])
        assert torch.linalg.eigvalsh(matrix).min() > -1e-10
    torch.testing.assert_close(at.gradient, objective.gradient(rows)[1])
    torch.testing.assert_close(at.losses, objective.gradient(rows)[0])


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_parameter_that_the_loss_does_not_use_has_gradient_0(kind, device):
    class Partial(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used = torch.nn.Linear(2, 1)
            self.unused = torch.nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.used(x)

    model = Partial().to(device, torch.float64)
    layout = Layout(dict(model.named_parameters()))
    loss = module_loss(model, torch.nn.functional.mse_loss)
    data = (torch.randn(2, 4, 2).to(device).double(), torch.randn(2, 4, 1).to(device).double())
    at = Objective(loss, layout, data).linearise(
        torch.randn(2, layout.dim, dtype=torch.float64, device=device), kind
    )
    assert (layout.unflatten(at.gradient)["unused"] == 0).all()
    product = at.matvec(torch.ones_like(at.gradient))
    assert (layout.unflatten(product)["unused"] == 0).all()
    assert (layout.unflatten(product)["used.weight"] != 0).any()


def test_a_linear_loss_has_curvature_0():
    layout = Layout({"w": torch.zeros(3)})
    x = torch.randn(2, 3)
    linear = Objective(lambda p, x: p["w"] @ x, layout, x).linearise(torch.zeros(2, 3), "hessian")
    assert torch.equal(linear.gradient, x)
    assert (linear.matvec(torch.ones(2, 3)) == 0).all()


@pytest.mark.parametrize(
    "loss", [lambda p, x: x.sum(), lambda p, x: (p["w"].argmax() == x.argmax()).float()]
)
def test_a_loss_that_does_not_depend_on_the_parameters_is_rejected(loss):
    objective = Objective(loss, Layout({"w": torch.zeros(3)}), torch.randn(2, 3), "query")
    with pytest.raises(ValueError, match="query: the loss does not depend differentiably on"):
        objective.gradient(torch.zeros(2, 3))


def test_the_callers_no_grad_has_no_effect(device):
    problem = regression(2, device)
    rows = rows_of(problem)
    objective = Objective(problem.loss, problem.layout, problem.support)
    want = objective.linearise(rows, "hessian").matvec(rows)
    with torch.no_grad():
        assert torch.equal(objective.linearise(rows, "hessian").matvec(rows), want)


def test_inference_mode_is_rejected_since_every_gradient_would_be_0(device):
    problem = regression(2, device)
    objective = Objective(problem.loss, problem.layout, problem.support)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use no_grad"):
        objective.gradient(rows_of(problem))


def test_ggn_products_with_dropout_are_positive_semidefinite():
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    layout = Layout(dict(model.named_parameters()))
    data = (torch.randn(3, 4, 2), torch.randn(3, 4, 1))
    loss = module_loss(model, torch.nn.functional.mse_loss)
    at = Objective(loss, layout, data).linearise(torch.randn(3, layout.dim), "ggn")
    vector = torch.randn(3, layout.dim)
    product = at.matvec(vector)
    assert ((vector * product).sum(1) >= 0).all()


def test_batch_norm_with_running_statistics_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    loss = module_loss(model, torch.nn.functional.mse_loss)
    layout = Layout(dict(model.named_parameters()))
    objective = Objective(loss, layout, (torch.randn(4, 5, 2), torch.randn(4, 5, 3)))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) would update its running statistics"):
        objective.gradient(torch.randn(4, layout.dim))
    model.eval()
    objective.gradient(torch.randn(4, layout.dim))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_data_that_is_not_a_pair_is_named(kind):
    model = torch.nn.Linear(2, 3)
    loss = module_loss(model, torch.nn.functional.mse_loss)
    layout = Layout(dict(model.named_parameters()))
    objective = Objective(loss, layout, torch.randn(4, 5, 2))
    with pytest.raises(TypeError, match=r"must be pairs \(x, y\) for module_loss, got Tensor"):
        objective.linearise(torch.randn(4, layout.dim), kind)


def test_ggn_needs_the_models_outputs():
    layout = Layout({"w": torch.zeros(3)})
    objective = Objective(lambda p, x: p["w"] @ x, layout, torch.randn(2, 3))
    with pytest.raises(TypeError, match="build the loss with module_loss"):
        objective.linearise(torch.zeros(2, 3), "ggn")
