"""Implicit meta-gradients against dense solves, finite differences of the bilevel objective, and
`reference.py`. Inner problems are solved to 1e-13 where the oracle assumes an optimum.
"""

import pytest
import torch
from method_problems import derivative
from problems import classification, regression

from imaml_ext import (
    ConjugateGradient,
    GradientDescent,
    Status,
    adapt,
    implicit_meta_grad,
    reference,
)
from imaml_ext.problem.lam import flatten_lam

# Accelerated, since each step takes about a millisecond on a GPU.
EXACT = {
    "inner": GradientDescent.accelerated(lr=0.1, steps=5000, strong_convexity=1.0, tol=1e-13),
    "linear": ConjugateGradient(max_iter=60, rtol=1e-14),
}
FORMS = ["float", "0-d", "per tensor", "diagonal", "dense"]


def make_lam(form, problem):
    device = problem.layout.device
    if form == "float":
        return 1.5
    if form == "0-d":
        return torch.tensor(1.5, dtype=torch.float64, device=device)
    if form == "per tensor":
        return {
            name: torch.tensor(1.0 + 0.3 * k, dtype=torch.float64, device=device)
            for k, name in enumerate(problem.params)
        }
    if form == "diagonal":
        return {name: 1 + torch.rand_like(tensor) for name, tensor in problem.params.items()}
    dim = problem.layout.dim
    root = torch.randn(dim, dim, dtype=torch.float64, device=device)
    return torch.eye(dim, dtype=torch.float64, device=device) + root @ root.T / dim


def matrix(problem, lam):
    """Λ, [D, D], from any form."""
    flat = flatten_lam(problem.layout, lam)
    return flat if flat.dim() == 2 else torch.diag(flat.expand(problem.layout.dim))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_gradient_agrees_with_a_dense_solve(form, device):
    problem = regression(4, device)
    lam = make_lam(form, problem)
    got = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam, **EXACT
    )
    phi = problem.layout.flatten(got.adapted)
    theta, dense_lam = problem.layout.flatten(problem.params), matrix(problem, lam)
    x = torch.linalg.solve(problem.hessians(phi) + dense_lam, problem.query_gradients(phi))
    assert relative(problem.layout.flatten(got.params), (x @ dense_lam).mean(0)) < 1e-10
    outer = -torch.einsum("bi,bj->ij", x, phi - theta) / 4
    per_entry = outer.diagonal()
    if form == "float":
        assert got.lam is None
    elif form == "0-d":
        assert relative(got.lam, per_entry.sum()) < 1e-9
    elif form == "dense":
        assert relative(got.lam, (outer + outer.T) / 2) < 1e-9
    else:
        want = problem.layout.unflatten(per_entry)
        for name, value in got.lam.items():
            expected = want[name].sum() if form == "per tensor" else want[name]
            assert relative(value, expected) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_gradient_agrees_with_finite_differences_of_the_bilevel_objective(form, device):
    problem = regression(3, device)
    lam = make_lam(form, problem)

    def objective(params, lam):  # at the optimum; its gradient is not used
        return implicit_meta_grad(
            problem.loss, params, problem.support, problem.query, lam=lam, inner=EXACT["inner"],
            linear=ConjugateGradient(max_iter=1),
        ).query_loss.mean()  # fmt: skip

    got = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam, **EXACT
    )

    def along(values, directions, of):  # the derivative along one random direction in all of them
        return derivative(
            lambda h: of({name: t + h * directions[name] for name, t in values.items()}),
            torch.zeros((), dtype=torch.float64, device=device), 1.0,
        )  # fmt: skip

    directions = {name: torch.randn_like(t) for name, t in problem.params.items()}
    want = along(problem.params, directions, lambda params: objective(params, lam))
    assert relative(sum((got.params[n] * d).sum() for n, d in directions.items()), want) < 1e-7
    if form == "float":
        want = derivative(lambda value: objective(problem.params, value), lam, 1.0)
        with_tensor = implicit_meta_grad(
            problem.loss, problem.params, problem.support, problem.query,
            lam=torch.tensor(lam, dtype=torch.float64, device=device), **EXACT,
        )  # fmt: skip
        assert relative(with_tensor.lam, want) < 1e-7
    elif form == "0-d":
        want = derivative(lambda value: objective(problem.params, value), lam, 1.0)
        assert relative(got.lam, want) < 1e-7
    elif form == "dense":
        direction = torch.randn_like(lam)
        direction = direction + direction.T
        want = derivative(lambda value: objective(problem.params, value), lam, direction)
        assert relative((got.lam * direction).sum(), want) < 1e-7
    else:
        directions = {name: torch.randn_like(t) for name, t in lam.items()}
        want = along(lam, directions, lambda lam: objective(problem.params, lam))
        assert relative(sum((got.lam[n] * d).sum() for n, d in directions.items()), want) < 1e-7


@pytest.mark.parametrize("form", FORMS[:-1])  # the reference has no dense lam
@pytest.mark.parametrize("inner_steps", [0, 1, 16])
def test_the_meta_gradient_agrees_with_the_reference_for_each_task(form, inner_steps, device):
    problem = regression(4, device)
    lam = make_lam(form, problem)
    # Before convergence H can be indefinite, which the reference does not handle: raise lam.
    lam = {name: 20 * t for name, t in lam.items()} if isinstance(lam, dict) else 20 * lam
    got = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam,
        inner=GradientDescent(lr=0.01, steps=inner_steps), linear=ConjugateGradient(max_iter=4),
    )  # fmt: skip
    assert (got.linear.status == Status.MAX_ITER).all()
    theta, diagonal = problem.layout.flatten(problem.params), matrix(problem, lam).diagonal()
    settings = {"lr": 0.01, "inner_steps": inner_steps, "cg_steps": 4}
    gradients = []
    for task in range(4):
        support, query = (tuple(t[task] for t in d) for d in (problem.support, problem.query))
        gradients.append(
            reference.implicit_meta_gradient(
                problem.flat_loss, theta, support, query, diagonal, **settings
            )
        )
    to_theta, to_lam = (torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True))
    assert relative(problem.layout.flatten(got.params), to_theta) < 1e-10
    if inner_steps == 0:  # phi = theta: no gradient for lam
        to_lam = torch.zeros_like(to_lam)
    if form == "0-d":
        torch.testing.assert_close(got.lam, to_lam.sum())
    elif form != "float":
        for name, part in problem.layout.unflatten(to_lam).items():
            want = part.sum() if form == "per tensor" else part
            torch.testing.assert_close(got.lam[name], want)


@pytest.mark.parametrize("form", FORMS)
def test_adapt_has_the_same_gradients_by_autograd(form, device):
    problem = regression(4, device)
    lam = make_lam(form, problem)
    want = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam, **EXACT
    )
    params = {name: t.clone().requires_grad_() for name, t in problem.params.items()}
    tensors = [lam] if isinstance(lam, torch.Tensor) else []
    tensors = list(lam.values()) if isinstance(lam, dict) else tensors
    for tensor in tensors:
        tensor.requires_grad_()
    phi = adapt(problem.loss, params, problem.support, lam=lam, **EXACT)
    torch.func.vmap(problem.loss)(phi, problem.query).mean().backward()
    for name, tensor in params.items():
        torch.testing.assert_close(tensor.grad, want.params[name])
    parts = list(want.lam.values()) if isinstance(lam, dict) else [want.lam] * len(tensors)
    for tensor, part in zip(tensors, parts, strict=True):
        torch.testing.assert_close(tensor.grad, part)


def test_adapt_is_part_of_a_larger_graph(device):
    # theta is a function of `scale`, which the gradient must reach.
    problem = regression(2, device)
    scale = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)

    def total(scale):
        params = {name: scale * t for name, t in problem.params.items()}
        phi = adapt(problem.loss, params, problem.support, lam=1.5, **EXACT)
        return torch.func.vmap(problem.loss)(phi, problem.query).sum()

    total(scale).backward()
    with torch.no_grad():
        want = (total(scale + 1e-5) - total(scale - 1e-5)) / 2e-5
    assert relative(scale.grad, want) < 1e-6


def test_float32_is_close_to_float64(device):
    problem = regression(8, device)
    settings = {
        "inner": GradientDescent(lr=0.1, steps=100),
        "linear": ConjugateGradient(max_iter=20),
    }
    single = problem.to(torch.float32)
    got = implicit_meta_grad(
        single.loss, single.params, single.support, single.query, lam=2.0, **settings
    )
    want = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=2.0, **settings
    )
    a, b = single.layout.flatten(got.params).double(), problem.layout.flatten(want.params)
    assert relative(a, b) < 1e-4


def test_gauss_newton_solves_with_the_gauss_newton_matrix(device):
    problem = classification(3, device)
    got = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=0.5,
        inner=GradientDescent(lr=0.1, steps=5),
        linear=ConjugateGradient(max_iter=200, rtol=1e-13, curvature="ggn"),
    )  # fmt: skip
    from imaml_ext.problem.objective import Objective

    phi = problem.layout.flatten(got.adapted)
    matvec = Objective(problem.loss, problem.layout, problem.support).linearise(phi, "ggn").matvec
    identity = torch.eye(problem.layout.dim, dtype=torch.float64, device=device)
    columns = [matvec(e.expand(3, -1)) for e in identity]
    matrix = torch.stack(columns, dim=2) + 0.5 * identity
    want = 0.5 * torch.linalg.solve(matrix, problem.query_gradients(phi)).mean(0)
    assert relative(problem.layout.flatten(got.params), want) < 1e-9
    assert (got.linear.lanczos.smallest >= 0.5 - 1e-9).all()


def test_passing_adapted_skips_the_inner_solve(device):
    problem = regression(4, device)
    first = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.5, **EXACT
    )

    class Unused(GradientDescent):
        def solve(self, *arguments):
            raise AssertionError("the inner solver ran")

    again = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.5,
        inner=Unused(), linear=EXACT["linear"], adapted=first.adapted,
    )  # fmt: skip
    for name in problem.params:
        assert torch.equal(again.params[name], first.params[name])
    assert (again.inner.steps == 0).all()


def test_the_error_estimate_bounds_the_distance_to_the_optimum(device):
    problem = regression(4, device)
    lam = 5.0  # makes the objective strongly convex
    exact = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam,
        inner=GradientDescent(lr=0.05, steps=5000, tol=1e-13), linear=EXACT["linear"],
    )  # fmt: skip
    for steps in (5, 20):
        rough = implicit_meta_grad(
            problem.loss, problem.params, problem.support, problem.query, lam=lam,
            inner=GradientDescent(lr=0.05, steps=steps), linear=EXACT["linear"],
        )  # fmt: skip
        error = (rough.inner.value - exact.inner.value).norm(dim=1)
        assert (error <= rough.inner.error_estimate * 1.05).all()
        assert (rough.inner.error_estimate <= 20 * error).all()


def test_the_curvature_of_the_inner_problem_excludes_the_damping(device):
    problem = regression(4, device)
    settings = {"lam": 5.0, "inner": GradientDescent(lr=0.05, steps=20)}
    plain, damped = (
        implicit_meta_grad(
            problem.loss, problem.params, problem.support, problem.query, **settings,
            linear=ConjugateGradient(max_iter=25, damping=damping),
        )
        for damping in (0.0, 3.0)
    )  # fmt: skip
    torch.testing.assert_close(
        damped.inner.lanczos.smallest, plain.inner.lanczos.smallest, rtol=0.01, atol=0
    )


def test_the_gauss_newton_matrix_gives_no_error_estimate_of_the_inner_solve(device):
    problem = classification(3, device)
    got = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=0.1,
        linear=ConjugateGradient(curvature="ggn"),
    )  # fmt: skip
    assert got.linear.error_estimate.isfinite().all()
    with pytest.raises(ValueError, match="measured no curvature"):
        _ = got.inner.error_estimate


def test_a_parameter_that_no_loss_uses_has_gradient_0(device):
    problem = regression(2, device)
    params = {**problem.params, "unused": torch.randn(3, dtype=torch.float64, device=device)}

    def loss(p, data):
        return problem.loss({name: p[name] for name in problem.params}, data)

    got = implicit_meta_grad(loss, params, problem.support, problem.query, lam=1.5, **EXACT)
    want = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=1.5, **EXACT
    )
    assert (got.params["unused"] == 0).all()
    for name in problem.params:
        torch.testing.assert_close(got.params[name], want.params[name])
    leaves = {name: t.clone().requires_grad_() for name, t in params.items()}
    phi = adapt(loss, leaves, problem.support, lam=1.5, **EXACT)
    torch.func.vmap(loss)(phi, problem.query).mean().backward()
    assert (leaves["unused"].grad == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (20, 1)])
def test_a_single_task_or_a_single_parameter_works(shape, device):
    tasks, dim = shape
    data = torch.randn(tasks, dim, dtype=torch.float64, device=device)
    theta = {"w": torch.randn(dim, dtype=torch.float64, device=device)}

    def loss(params, target):
        return 0.5 * ((params["w"] - target) ** 2).sum()

    got = implicit_meta_grad(loss, theta, data, -data, lam=3.0, **EXACT)
    phi = (data + 3 * theta["w"]) / 4  # the optimum of a quadratic, and H = I
    torch.testing.assert_close(got.adapted["w"], phi)
    torch.testing.assert_close(got.params["w"], (0.75 * (phi + data)).mean(0))
