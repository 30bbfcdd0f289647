"""What the authors' released code computes, against its formulas."""

import pytest
import torch

from imaml_ext import GradientDescent, StepSize
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal


def quadratic(tasks=3, dim=4):
    factor = torch.randn(tasks, dim, dim, dtype=torch.float64)
    hessian, linear = factor @ factor.mT / dim, torch.randn(tasks, dim, dtype=torch.float64)

    def loss(params, data):
        h, b = data
        return 0.5 * params["w"] @ h @ params["w"] - b @ params["w"]

    theta = torch.randn(dim, dtype=torch.float64)
    layout = Layout({"w": theta.requires_grad_()})
    problem = Proximal(
        Objective(loss, layout, (hessian, linear)), theta.detach(), theta.detach().new_full((1,), 2)
    )
    return problem, hessian, linear


def test_the_authors_code_applies_the_proximal_term_once():
    problem, hessian, linear = quadratic()
    phi = problem.start()
    for _ in range(7):
        phi = phi - 0.1 * ((hessian @ phi[..., None])[..., 0] - linear)
    want = problem.theta + (1 - 0.1 * 2) * (phi - problem.theta)
    got = DescentThenProximal(lr=0.1, steps=7).solve(problem).value
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, GradientDescent(lr=0.1, steps=7).solve(problem).value)


def test_the_authors_code_solves_another_system():
    problem, hessian, _ = quadratic()
    v = torch.randn(3, 4, dtype=torch.float64)
    at = problem.objective.linearise(problem.start(), "hessian")
    solution = AuthorsCodeCG(max_iter=8).solve(at.matvec, v, problem.lam.values)
    lam = 2.0
    system = 2 * torch.eye(4, dtype=torch.float64) + hessian / (lam + 10)
    torch.testing.assert_close(lam * solution.value, torch.linalg.solve(system, v))
    # An estimate would be for another system.
    with pytest.raises(ValueError, match="measured no curvature"):
        _ = solution.error_estimate
    with pytest.raises(ValueError, match="starts from 0"):
        AuthorsCodeCG(max_iter=8).solve(at.matvec, v, problem.lam.values, x0=torch.ones_like(v))


@pytest.mark.parametrize("lam", [2 * torch.eye(4).double(), torch.full((3, 1), 2.0).double()])
def test_the_authors_code_refuses_a_lam_that_it_cannot_scale(lam):
    with pytest.raises(ValueError, match="needs a scalar or diagonal lam, the same for all tasks"):
        AuthorsCodeCG(max_iter=8).solve(lambda p: p, torch.ones(3, 4).double(), lam)


def test_the_authors_descent_refuses_step_sizes():
    with pytest.raises(TypeError, match="lr must be a number, got StepSize"):
        DescentThenProximal(lr=StepSize({"w": torch.zeros(4)}))
