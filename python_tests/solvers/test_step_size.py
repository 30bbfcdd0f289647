"""Inner solvers whose step sizes are tensors, against their kernels and plain loops."""

import pytest
import torch
from problems import regression

from imaml_ext import Adam, GradientDescent, Proximal, StepSize, adapt, implicit_meta_grad
from imaml_ext.problem.objective import Objective

SOLVERS = {
    "plain": lambda **s: GradientDescent(**s),
    "nesterov": lambda **s: GradientDescent(momentum=0.7, nesterov=True, **s),
    "adam": lambda **s: Adam(**s),
}


def inner_problem(device, lam):
    problem = regression(4, device)
    objective = Objective(problem.loss, problem.layout, problem.support)
    lam = torch.as_tensor(lam, dtype=torch.float64, device=device).reshape(-1)
    return problem, Proximal(objective, problem.layout.flatten(problem.params), lam)


@pytest.mark.parametrize("tol", [None, 0.5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_scalar_step_size_takes_the_steps_of_a_number(solver, tol, device):
    problem, inner = inner_problem(device, 1.5)
    rate = StepSize(problem.params, 0.05).requires_grad_(False)
    got, want = (SOLVERS[solver](lr=lr, steps=6, tol=tol).solve(inner) for lr in (rate, 0.05))
    torch.testing.assert_close(got.value, want.value, rtol=1e-12, atol=1e-12)
    assert torch.equal(got.status, want.status)
    assert torch.equal(got.steps, want.steps)
    if solver == "adam":
        torch.testing.assert_close(got.second_moment, want.second_moment)
    if tol is not None:
        assert len(set(got.steps.tolist())) > 1


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("form", ["tensor", "diagonal"])
def test_step_sizes_of_every_form_multiply_the_gradients(form, steps, device):
    problem, inner = inner_problem(device, 0.5)
    rate = StepSize(problem.params, 0.05, form=form, steps=steps).requires_grad_(False)
    for value in rate.values:
        value += torch.rand_like(value)
    got = GradientDescent(lr=rate, steps=3).solve(inner).value
    for task in range(4):
        phi = {name: t.clone() for name, t in problem.params.items()}
        data = tuple(t[task] for t in problem.support)
        for step in range(3):
            leaves = {name: t.detach().requires_grad_() for name, t in phi.items()}
            value = problem.loss(leaves, data)
            gradients = torch.autograd.grad(value, list(leaves.values()))
            for (name, start), gradient in zip(problem.params.items(), gradients, strict=True):
                lr = rate()[name] if steps is None else rate()[name][step]
                phi[name] = phi[name] - lr * (gradient + 0.5 * (phi[name] - start))
        torch.testing.assert_close(got[task], problem.layout.flatten(phi))


def test_the_implicit_gradient_takes_constant_step_sizes_only(device):
    problem = regression(3, device)
    params = {name: t.requires_grad_() for name, t in problem.params.items()}
    rate = StepSize(params, 0.05, form="tensor")
    given = problem.loss, params, problem.support
    inner = GradientDescent(lr=rate, steps=3)
    for call in (
        lambda: implicit_meta_grad(*given, problem.query, lam=1.5, inner=inner),
        lambda: adapt(*given, lam=1.5, inner=inner),
    ):
        with pytest.raises(ValueError, match=r"requires_grad_\(False\) on the StepSize"):
            call()
    rate.requires_grad_(False)
    got = implicit_meta_grad(*given, problem.query, lam=1.5, inner=inner)
    plain = GradientDescent(lr=0.05, steps=3)
    want = implicit_meta_grad(*given, problem.query, lam=1.5, inner=plain)
    for name, gradient in want.params.items():
        torch.testing.assert_close(got.params[name], gradient)
