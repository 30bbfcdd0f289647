"""Cases of optimistix (test_root_find, test_least_squares, test_minimise, test_fixed_point) and
lineax (test_solve, test_adjoint, test_singular, test_well_posed).

Re-created: derivatives of the minima of its test functions by their arguments, of nonlinear least
squares, and of roots and fixed points whose Jacobian is not symmetric, as minima of `1/2 |f|^2`;
linear solves and their derivatives; singular systems; a solve that did not converge.
"""

import pytest
import torch
from bilevel import minimum, proximal, randn, same, tasks, value
from exact import CG, EXACT
from torch.func import jacrev, vmap

import imaml_ext
from imaml_ext import MINRES, ConjugateGradient, HessianFree, Status, adapt, conjugate_gradient


def solved(loss, start, data, **settings):
    """The minima of all tasks, without a proximal term, in the graph of the data."""
    return adapt(loss, start, data, lam=0.0, **(EXACT | settings))


def bowl(params, data):
    y = params["y"]
    return (data[0] * (y - data[1]).square()).sum()


def matyas(params, data):
    y, z = params["y"]
    return data[0] * (y * y + z * z) - data[1] * y * z - y - 2 * z


def rosenbrock(params, data):
    y, z = params["y"]
    return (data[0] - y).square() + data[1] * (z - y * y).square()


def himmelblau(params, data):
    y, z = params["y"]
    return (y * y + z - data[0]).square() + (y + z * z - data[1]).square()


def beale(params, data):
    y, z = params["y"]
    terms = zip(data, (1, 2, 3), strict=True)
    return sum((c - y + y * z**power).square() for c, power in terms)


def around(*centres):
    """A value for each of three tasks, near each of the centres."""
    return tuple(c * (1 + 0.05 * torch.rand(3, dtype=torch.float64)) for c in centres)


# Function, start, and arguments; rosenbrock's minimum is (a, a^2), whatever the other argument is.
MINIMA = {
    "bowl": (bowl, (1.0, 1.0), around(2.0, 0.5)),
    "matyas": (matyas, (1.0, 1.0), around(0.26, 0.1)),
    "rosenbrock": (rosenbrock, (0.8, 0.6), around(1.0, 5.0)),
    "himmelblau": (himmelblau, (2.9, 1.9), around(11.0, 7.0)),
    "beale": (beale, (2.9, 0.45), around(1.5, 2.25, 2.625)),
}


@pytest.mark.parametrize(("loss", "start", "data"), MINIMA.values(), ids=MINIMA)
def test_the_minimum_of_a_function_has_the_derivatives_of_its_arguments(loss, start, data):
    start = {"y": torch.tensor(start, dtype=torch.float64)}
    data = tuple(t.clone().requires_grad_() for t in data)
    weight = randn(3, 2)
    got = torch.autograd.grad((weight * solved(loss, start, data)["y"]).sum(), data)
    exact = [minimum(lambda y, own=own: loss(y, own), start)["y"] for own in tasks(data)]
    want = torch.autograd.grad((weight * torch.stack(exact)).sum(), data)
    same(got, want)
    if loss is rosenbrock:
        same([got[0]], [weight[:, 0] + 2 * data[0] * weight[:, 1]])


def test_nonlinear_least_squares_with_residuals_has_the_derivatives_of_its_minimum():
    t = torch.linspace(0, 1, 12, dtype=torch.float64).expand(3, 12)
    y = (2 * (-1.5 * t).exp() + 0.1 * randn(3, 12)).requires_grad_()
    theta = {"scale": torch.tensor(1.5).double(), "rate": torch.tensor(1.0).double()}

    def decay(params, data):
        t, y = data
        return (params["scale"] * (-params["rate"] * t).exp() - y).square().sum()

    weight = randn(3)
    phi = solved(decay, theta, (t, y))
    got = torch.autograd.grad((weight * phi["rate"] * phi["scale"]).sum(), y)
    total = 0
    for w, own in zip(weight, tasks((t, y)), strict=True):
        exact = minimum(lambda params, own=own: decay(params, own), theta)
        total = total + w * exact["rate"] * exact["scale"]
    same(got, torch.autograd.grad(total, y))


def implicit_function(f, y, data, weight):
    """`-weight' (df/dy)^-1 df/d(data)` at the roots, by dense Jacobians, for each tensor."""
    total = 0
    for row, own, w in zip(y, tasks(data), weight, strict=True):
        jacobian = jacrev(lambda row, own=own: f(row, *own))(row)
        total = total - torch.linalg.solve(jacobian.T, w) @ f(row, *own)
    return torch.autograd.grad(total, data)


def squared(f):
    return lambda params, data: 0.5 * f(params["y"], *data).square().sum()


def nonlinear(y, matrix, b):
    return matrix @ y + 0.3 * y.sin() - b


def contraction(y, matrix, b):
    return y - (0.3 * matrix @ y + b).tanh()


@pytest.mark.parametrize("f", [nonlinear, contraction], ids=["root", "fixed point"])
def test_a_root_of_an_unsymmetric_system_has_the_derivatives_of_the_implicit_function(f):
    matrix = (torch.eye(4, dtype=torch.float64) + 0.2 * randn(3, 4, 4)).requires_grad_()
    b = randn(3, 4).requires_grad_()
    y = solved(squared(f), {"y": torch.zeros(4).double()}, (matrix, b))["y"]
    roots = torch.stack([f(row, *own) for row, own in zip(y, tasks((matrix, b)), strict=True)])
    assert roots.abs().max() < 1e-9
    weight = randn(3, 4)
    got = torch.autograd.grad((weight * y).sum(), (matrix, b))
    same(got, implicit_function(f, y.detach(), (matrix, b), weight), rtol=1e-7)
    # 1e-7: the condition number of the squared system is that of the system, squared


def symmetric(count, size, shift):
    root = randn(count, size, size)
    return root @ root.mT / size + shift * torch.eye(size, dtype=torch.float64)


def product(matrices):
    return lambda p: (matrices @ p[..., None])[..., 0]


LINEAR = {
    "cg": ConjugateGradient(max_iter=60, rtol=1e-12),
    "preconditioned cg": ConjugateGradient(max_iter=80, rtol=1e-12, preconditioner="jacobi"),
    "minres": MINRES(max_iter=60, rtol=1e-12),
}


@pytest.mark.parametrize("solver", LINEAR.values(), ids=LINEAR)
def test_a_positive_definite_system_is_solved(solver):
    matrices, b = symmetric(4, 15, 0.5), randn(4, 15)
    got = solver.solve(product(matrices), b)
    same([got.value], [torch.linalg.solve(matrices, b)])
    assert (got.status == Status.CONVERGED).all()


def test_an_indefinite_system_is_solved_by_minres_and_reported_by_conjugate_gradient():
    matrices, b = symmetric(4, 15, -0.6), randn(4, 15)
    assert (torch.linalg.eigvalsh(matrices)[:, 0] < 0).all()
    got = MINRES(max_iter=80, rtol=1e-12).solve(product(matrices), b)
    same([got.value], [torch.linalg.solve(matrices, b)])
    assert (got.status == Status.CONVERGED).all()
    reported = conjugate_gradient(product(matrices), b, max_iter=80, rtol=1e-12)
    assert (reported.status == Status.NEGATIVE_CURVATURE).all()


def test_a_negative_definite_system_is_solved_by_minres():
    matrices, b = -symmetric(4, 15, 0.5), randn(4, 15)
    got = MINRES(max_iter=60, rtol=1e-12).solve(product(matrices), b)
    same([got.value], [torch.linalg.solve(matrices, b)])


def test_a_linear_solve_has_the_derivatives_of_the_dense_solve():
    # x = A^-1 b is the minimum of 1/2 x'Ax - b'x.
    matrix, b = symmetric(3, 6, 1.0).requires_grad_(), randn(3, 6).requires_grad_()

    def quadratic(params, data):
        a, b = data
        return 0.5 * params["x"] @ a @ params["x"] - b @ params["x"]

    weight = randn(3, 6)
    x = solved(quadratic, {"x": torch.zeros(6).double()}, (matrix, b))["x"]
    got = torch.autograd.grad((weight * x).sum(), (matrix, b))
    exact = torch.linalg.solve(0.5 * (matrix + matrix.mT), b)
    same(got, torch.autograd.grad((weight * exact).sum(), (matrix, b)))


def singular(count=4, size=12, rank=8):
    root = randn(count, size, rank)
    return root @ root.mT / size


@pytest.mark.parametrize("solver", LINEAR.values(), ids=LINEAR)
def test_a_singular_system_with_a_solution_is_solved(solver):
    matrices = singular()
    b = product(matrices)(randn(4, 12))
    got = solver.solve(product(matrices), b)
    residual = (b - product(matrices)(got.value)).norm(dim=1)
    assert (residual <= 1e-9 * b.norm(dim=1)).all()
    if solver.__class__ is MINRES or solver.preconditioner is None:  # it stays in the range
        same([got.value], [product(torch.linalg.pinv(matrices, rtol=1e-12))(b)], rtol=1e-6)


@pytest.mark.parametrize("solver", LINEAR.values(), ids=LINEAR)
def test_a_singular_system_without_a_solution_does_not_converge(solver):
    matrices, b = singular(), randn(4, 12)
    got = solver.solve(product(matrices), b)
    assert (got.status != Status.CONVERGED).all()
    assert got.value.abs().max() < 1e8


def test_minres_ends_at_the_least_squares_solution_of_a_singular_system():
    matrices, b = singular(), randn(4, 12)
    got = MINRES(max_iter=80, rtol=1e-12).solve(product(matrices), b)
    least = product(matrices @ torch.linalg.pinv(matrices, rtol=1e-12))(b)
    residual = (b - product(matrices)(got.value)).norm(dim=1)
    same([residual], [(b - least).norm(dim=1)], rtol=1e-6)


def test_a_well_posed_system_of_a_large_condition_number_is_solved():
    eigenvalues = torch.logspace(0, 6, 20, dtype=torch.float64)
    basis = torch.linalg.qr(randn(3, 20, 20))[0]
    matrices, b = basis @ (eigenvalues[:, None] * basis.mT), randn(3, 20)
    got = ConjugateGradient(max_iter=400, rtol=1e-10).solve(product(matrices), b)
    residual = (b - product(matrices)(got.value)).norm(dim=1)
    assert (residual <= 1e-8 * b.norm(dim=1)).all()
    assert (got.status == Status.CONVERGED).all()


def test_a_minimisation_that_has_not_converged_warns_in_backward():
    # optimistix's issue 54. With the default 16 steps of 0.1, ridge regression is not solved.
    x = randn(3, 20, 4) * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    data, theta = (x, randn(3, 20)), {"w": randn(4).requires_grad_()}

    def squares(params, data):
        x, y = data
        return (x @ params["w"] - y).square().mean()

    phi = adapt(squares, theta, data, lam=1e-3)
    with pytest.warns(imaml_ext.ConvergenceWarning):
        vmap(squares)(phi, data).mean().backward()


def test_a_converged_minimisation_does_not_warn():
    x, y = randn(3, 20, 4), randn(3, 20)
    theta = {"w": randn(4).requires_grad_()}

    def squares(params, data):
        x, y = data
        return (x @ params["w"] - y).square().mean()

    inner = HessianFree(steps=3, linear=CG, damping=0.0)
    phi = adapt(squares, theta, (x, y), lam=0.1, inner=inner, linear=CG)
    vmap(squares)(phi, (x, y)).mean().backward()  # warnings are errors
    bilevel = value(proximal(squares, theta, 0.1), squares, theta, (x, y), (x, y))
    same([theta["w"].grad], torch.autograd.grad(bilevel, theta["w"]))
