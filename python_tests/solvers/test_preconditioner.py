"""Preconditioned conjugate gradient against scaled systems, dense solves and SciPy."""

import pytest
import torch
from matrices import product, symmetric
from scipy.sparse.linalg import cg as scipy_cg

from imaml_ext import ConjugateGradient, Status, conjugate_gradient
from imaml_ext.solvers.linear.base import LinearSystem
from imaml_ext.solvers.linear.preconditioner import _jacobi_diagonal


def test_preconditioned_iterates_are_those_of_the_scaled_system(device):
    # PCG on A x = b is CG on S A S y = S b with S = M^-1/2 and x = S y.
    h = symmetric(torch.rand(3, 25, dtype=torch.float64, device=device) * 5 + 0.1)
    b = torch.randn(3, 25, dtype=torch.float64, device=device)
    m = torch.rand(3, 25, dtype=torch.float64, device=device) + 0.1
    s = m.rsqrt()
    for steps in (1, 2, 7):
        got = conjugate_gradient(product(h), b, lam=0.5, max_iter=steps, preconditioner=m)
        want = conjugate_gradient(
            lambda p: s * (product(h)(s * p) + 0.5 * s * p), s * b, max_iter=steps
        )
        torch.testing.assert_close(got.value, s * want.value)
        torch.testing.assert_close(got.lanczos.ritz / got.lanczos.scale[:, None], want.lanczos.ritz)
        residual = (b - product(h)(got.value) - 0.5 * got.value).norm(dim=1)
        torch.testing.assert_close(got.residual, residual)  # of the original system


def test_a_jacobi_preconditioner_removes_bad_scaling(device):
    # H is diagonal: the estimate is exact and one step suffices, where plain CG takes dozens.
    h = torch.logspace(-2, 4, 60, dtype=torch.float64, device=device).expand(4, -1)
    b = torch.randn(4, 60, dtype=torch.float64, device=device)
    plain = ConjugateGradient(max_iter=500, rtol=1e-8).solve(lambda p: h * p, b, 0.1)
    jacobi = ConjugateGradient(max_iter=500, rtol=1e-8, preconditioner="jacobi", probes=1)
    got = jacobi.solve(lambda p: h * p, b, 0.1)
    assert (got.steps == 1).all()
    assert (plain.steps > 30).all()
    torch.testing.assert_close(got.value, b / (h + 0.1))


def test_the_jacobi_estimate_is_the_diagonal(device):
    h = symmetric(torch.rand(2, 12, dtype=torch.float64, device=device))
    zeros = torch.zeros(2, 12, dtype=torch.float64, device=device)
    got = _jacobi_diagonal(LinearSystem(product(h), zeros, 0.0, damping=0.0), 5000)
    # The standard error of a sum of 11 signed off-diagonal entries over 5000 probes.
    error = (h**2).sum(2).sqrt().max().item() / 5000**0.5
    assert ((got - h.diagonal(dim1=1, dim2=2)).abs() < 5 * error).all()


def test_the_error_estimate_bounds_the_error_with_a_preconditioner(device):
    h = symmetric(torch.logspace(-1, 1, 12, dtype=torch.float64, device=device).expand(4, -1))
    b = torch.randn(4, 12, dtype=torch.float64, device=device)
    m = torch.rand(4, 12, dtype=torch.float64, device=device) + 0.5
    got = conjugate_gradient(product(h), b, max_iter=11, preconditioner=m)
    error = (got.value - torch.linalg.solve(h, b)).norm(dim=1)
    assert (error <= got.error_estimate * (1 + 1e-6)).all()


def test_the_adam_preconditioner_needs_the_second_moment():
    solver = ConjugateGradient(preconditioner="adam")
    with pytest.raises(ValueError, match="needs the second moment of the inner solver"):
        solver.solve(lambda p: p, torch.ones(2, 3))


def test_iterations_past_float32_convergence_stay_finite(device):
    # Once the Krylov space is exhausted, residuals decrease until M^-1 r would underflow.
    d = torch.rand(16, 8, device=device) + 1
    b = torch.randn(16, 8, device=device)
    for preconditioner in (None, "jacobi"):
        solver = ConjugateGradient(max_iter=80, preconditioner=preconditioner)
        got = solver.solve(lambda p: d * p, b, 1.0)
        assert (got.status == Status.CONVERGED).all()
        torch.testing.assert_close(got.value, b / (d + 1))
        small = solver.solve(lambda p: 1e-3 * d * p, b, 1e-3)
        assert (small.status == Status.CONVERGED).all()


def test_the_adam_preconditioner_is_proportional_to_the_root_of_the_second_moment(device):
    # H = c sqrt(second moment): the preconditioner is exact, and one step solves.
    root = torch.logspace(-2, 2, 40, dtype=torch.float64, device=device).expand(3, -1)
    b = torch.randn(3, 40, dtype=torch.float64, device=device)
    solver = ConjugateGradient(max_iter=50, rtol=1e-8, preconditioner="adam")
    got = solver.solve(lambda p: 7 * root * p, b, 0.5, second_moment=root**2)
    assert (got.steps == 1).all()
    torch.testing.assert_close(got.value, b / (7 * root + 0.5))


def test_a_preconditioner_includes_the_damping(device):
    h = torch.logspace(-4, 0, 30, dtype=torch.float64, device=device).expand(2, -1)
    b = torch.randn(2, 30, dtype=torch.float64, device=device)
    solver = ConjugateGradient(30, rtol=1e-8, damping=0.1, preconditioner="jacobi", probes=1)
    assert (solver.solve(lambda p: h * p, b).steps == 1).all()


def test_a_preconditioned_ritz_value_is_scaled_by_the_smallest_entry_of_m(device):
    # A = M: the preconditioned matrix is I, so the estimate of the smallest eigenvalue is exact.
    m = torch.tensor([[0.01, 5.0, 100.0]], dtype=torch.float64, device=device)
    b = torch.ones(1, 3, dtype=torch.float64, device=device)
    got = conjugate_gradient(lambda p: m * p, b, max_iter=2, preconditioner=m)
    torch.testing.assert_close(got.lanczos.smallest, m[:, 0])


def test_the_jacobi_estimate_does_not_depend_on_the_batch(device):
    h = symmetric(torch.rand(4, 12, dtype=torch.float64, device=device) + 0.1)
    b = torch.randn(4, 12, dtype=torch.float64, device=device)
    solver = ConjugateGradient(max_iter=3, preconditioner="jacobi", probes=2)
    whole, alone = solver.solve(product(h), b), solver.solve(product(h[2:3]), b[2:3])
    torch.testing.assert_close(whole.value[2:3], alone.value, rtol=1e-12, atol=0)


# ---- matrices and functions


def spd(*shape, device):
    return symmetric(torch.rand(*shape, dtype=torch.float64, device=device) * 3 + 0.2)


def as_matrix(m, form):
    return {"shared": m[0], "one": m[:1], "each": m, "function": lambda r: _solve(m, r)}[form]


def _solve(m, r):
    return torch.linalg.solve(m, r[..., None])[..., 0]


FORMS = ["shared", "one", "each", "function"]


@pytest.mark.parametrize("form", FORMS)
def test_every_iterate_with_a_matrix_agrees_with_scipy(form, device):
    h, m = spd(4, 14, device=device), spd(4, 14, device=device)
    if form in ("shared", "one"):
        m = m[:1].expand_as(m)
    b = torch.randn(4, 14, dtype=torch.float64, device=device)
    for steps in (1, 2, 6):
        got = conjugate_gradient(
            product(h), b, lam=0.3, damping=0.2, max_iter=steps, preconditioner=as_matrix(m, form)
        )
        assert (got.steps == steps).all()
        for k in range(4):
            a = (h[k] + 0.5 * torch.eye(14).to(h)).cpu().numpy()
            inverse = torch.linalg.inv(m[k]).cpu().numpy()
            want, _ = scipy_cg(a, b[k].cpu().numpy(), rtol=0, atol=0, maxiter=steps, M=inverse)
            torch.testing.assert_close(got.value[k].cpu(), torch.from_numpy(want))
        residual = (b - product(h)(got.value) - 0.5 * got.value).norm(dim=1)
        torch.testing.assert_close(got.residual, residual)


def test_a_diagonal_as_a_function_gives_the_fused_iterates(dtype, device):
    h = symmetric(torch.rand(3, 20, dtype=dtype, device=device) * 5 + 0.5)
    b = torch.randn(3, 20, dtype=dtype, device=device)
    m = torch.rand(3, 20, dtype=dtype, device=device) + 0.5
    settings = {"lam": 0.3, "max_iter": 40, "rtol": 1e-4}
    fused = conjugate_gradient(product(h), b, preconditioner=m, **settings)
    other = conjugate_gradient(product(h), b, preconditioner=lambda r: r / m, **settings)
    assert torch.equal(other.status, fused.status)
    assert torch.equal(other.steps, fused.steps)
    torch.testing.assert_close(other.value, fused.value, rtol=1e-3, atol=1e-4)


def test_the_matrix_itself_as_preconditioner_solves_in_one_step(device):
    h = spd(5, 9, device=device)
    b = torch.randn(5, 9, dtype=torch.float64, device=device)
    solver = ConjugateGradient(max_iter=20, rtol=1e-10, preconditioner=lambda r: _solve(h, r))
    got = solver.solve(product(h), b)
    assert (got.steps == 1).all()
    assert (got.status == Status.CONVERGED).all()
    torch.testing.assert_close(got.value, _solve(h, b))


def test_the_curvature_reported_lies_inside_the_spectrum_and_estimates_the_error(device):
    h, m = spd(6, 12, device=device), spd(6, 12, device=device)
    b = torch.randn(6, 12, dtype=torch.float64, device=device)
    got = conjugate_gradient(product(h), b, max_iter=6, preconditioner=m)
    eigenvalues = torch.linalg.eigvalsh(h)
    assert (got.lanczos.smallest >= eigenvalues[:, 0] * (1 - 1e-12)).all()
    assert (got.lanczos.largest <= eigenvalues[:, -1] * (1 + 1e-12)).all()
    assert (got.lanczos.largest > got.lanczos.smallest).all()


def test_rows_stop_and_fail_independently_with_a_function(device):
    eigenvalues = torch.rand(5, 8, dtype=torch.float64, device=device) + 1
    eigenvalues[1] = -eigenvalues[1]
    eigenvalues[2, 0] = -0.2
    h, b = symmetric(eigenvalues), torch.randn(5, 8, dtype=torch.float64, device=device)
    h[3] = torch.nan
    b[4] = 0
    m = torch.rand(5, 8, dtype=torch.float64, device=device) + 0.5
    settings = {"lam": 0.1, "max_iter": 30, "rtol": 1e-9}
    got = conjugate_gradient(product(h), b, preconditioner=lambda r: r / m, **settings)
    fused = conjugate_gradient(product(h), b, preconditioner=m, **settings)
    assert got.status.tolist() == [
        Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.NEGATIVE_CURVATURE, Status.NONFINITE,
        Status.CONVERGED,
    ]  # fmt: skip
    assert torch.equal(got.status, fused.status)
    assert torch.equal(got.steps, fused.steps)
    torch.testing.assert_close(got.value, fused.value)
    assert torch.isinf(got.error_estimate[1])


def test_a_function_that_is_not_positive_definite_makes_the_rows_nonfinite(device):
    b = torch.ones(2, 3, dtype=torch.float64, device=device)
    for preconditioner in (lambda r: -r, lambda r: r * torch.nan):
        got = conjugate_gradient(lambda p: p, b, max_iter=3, preconditioner=preconditioner)
        assert (got.status == Status.NONFINITE).all()
        assert (got.value == 0).all()


def test_a_singular_system_is_detected_with_a_matrix(device):
    h = torch.tensor([[1.0, 1e-17]], dtype=torch.float64, device=device)
    b = torch.ones(1, 2, dtype=torch.float64, device=device)
    m = torch.eye(2, dtype=torch.float64, device=device) * 2
    got = conjugate_gradient(lambda p: h * p, b, max_iter=5, preconditioner=m)
    assert got.status.item() == Status.NEGATIVE_CURVATURE
    assert not got.value.any()


@pytest.mark.parametrize(
    ("preconditioner", "message"),
    [
        (torch.ones(3), r"preconditioner must be \[2, 4\] or \[4\] or \[4, 4\]"),
        (torch.eye(4).double(), "torch.float32"),
        (-torch.eye(4), "must be symmetric positive definite"),
        (torch.eye(4) + torch.triu(torch.ones(4, 4), 1), "must be symmetric positive definite"),
        (torch.eye(4)[None] * torch.nan, "must be symmetric positive definite"),
        (torch.zeros(4), "must be positive and finite"),
        (lambda r: r[:1], r"the result of preconditioner must be \[2, 4\]"),
        (lambda r: None, "preconditioner must return a tensor, got NoneType"),
        (lambda: None, r"preconditioner must be a function of \(r\)"),
        (3.0, r"preconditioner must be a function of \(r\), got float: or pass a tensor"),
    ],
)
def test_an_invalid_preconditioner_is_refused(preconditioner, message):
    with pytest.raises((TypeError, ValueError), match=message):
        conjugate_gradient(lambda p: p, torch.ones(2, 4), max_iter=1, preconditioner=preconditioner)


def test_a_square_tensor_is_refused_where_b_equals_d():
    b = torch.ones(3, 3)
    with pytest.raises(ValueError, match="may be a matrix or one diagonal per row"):
        conjugate_gradient(lambda p: p, b, max_iter=1, preconditioner=torch.eye(3) + 1)
    got = conjugate_gradient(lambda p: 2 * p, b, max_iter=1, preconditioner=2 * torch.eye(3)[None])
    torch.testing.assert_close(got.value, b / 2)


@pytest.mark.parametrize("name", ["jacobi", "adam"])
def test_a_named_preconditioner_works_with_as_many_rows_as_columns(name, device):
    h = symmetric(torch.rand(5, 5, dtype=torch.float64, device=device) + 0.5)
    b = torch.randn(5, 5, dtype=torch.float64, device=device)
    second = torch.rand(5, 5, dtype=torch.float64, device=device)
    solver = ConjugateGradient(max_iter=20, rtol=1e-12, preconditioner=name)
    got = solver.solve(product(h), b, 0.5, second_moment=second)
    eye = torch.eye(5, dtype=torch.float64, device=device)
    dense = torch.stack([product(h)(row.expand(5, -1)) for row in eye], dim=2)
    torch.testing.assert_close(got.value, torch.linalg.solve(dense + 0.5 * eye, b))


@pytest.mark.parametrize("form", ["shared", "each"])
def test_systems_without_unknowns_are_solved_with_a_matrix(form):
    m = torch.zeros(0, 0) if form == "shared" else torch.zeros(3, 0, 0)
    got = conjugate_gradient(lambda p: p, torch.zeros(3, 0), max_iter=2, preconditioner=m)
    assert (got.status == Status.CONVERGED).all()
