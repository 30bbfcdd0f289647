"""Singular and ill-conditioned systems: no status or residual claims more than x achieves.

The true residuals are computed densely in float64. SciPy's solvers get the same systems.
"""

import pytest
import torch
from matrices import product, symmetric
from scipy.sparse.linalg import cg as scipy_cg
from scipy.sparse.linalg import minres as scipy_minres

from imaml_ext import MINRES, ConjugateGradient, NeumannSeries, Status, conjugate_gradient
from imaml_ext._tracing import recording

SINGULAR = torch.tensor([[2.0, -2, -1], [-2, 20, 22], [-1, 22, 25]], dtype=torch.float64)  # rank 2
LEAST_SQUARES = torch.tensor([[2.0, 1, 0], [1, 3, 0], [0, 0, 0]], dtype=torch.float64)
SOLVERS = {"cg": ConjugateGradient, "minres": MINRES}
PEERS = {"cg": scipy_cg, "minres": scipy_minres}


def relative_residual(h, b, x):
    h, b, x = h.double(), b.double(), x.double()
    return (b - product(h)(x)).norm(dim=1) / b.norm(dim=1)


def singular_systems(dim, rows, outside, smallest):
    """Symmetric matrices of rank 30% to 90%, eigenvalues of up to 4 decades, and right-hand sides.

    The other eigenvalues are random up to `smallest`.
    """
    decades = 4.0 * (torch.arange(rows) % 2)[:, None]
    eigenvalues = 10 ** (-decades * torch.rand(rows, dim, dtype=torch.float64))
    rank = (dim * (0.3 + 0.6 * torch.rand(rows, 1))).int().clamp(min=1)
    tiny = smallest * torch.rand(rows, dim, dtype=torch.float64)
    h = symmetric(torch.where(torch.arange(dim) < rank, eigenvalues, tiny))
    b = torch.randn(rows, dim, dtype=torch.float64)
    return h, b if outside else product(h)(b)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("smallest", [0.0, 1e-15, 1e-11])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_singular_system_is_converged_far_from_its_tolerance(solver, smallest, outside, dtype):
    rtols = [1e-2, 1e-8 if dtype == torch.float64 else 1e-4]
    ours = scipys = reached = 0
    for dim in (3, 12, 40):
        h, b = singular_systems(dim, 100, outside, smallest)
        h, b = h.to(dtype), b.to(dtype)
        for rtol in rtols:
            got = SOLVERS[solver](max_iter=4 * dim, rtol=rtol).solve(product(h), b)
            far = relative_residual(h, b, got.value) > 2.1 * rtol  # 2, and rounding
            ours += int(((got.status == Status.CONVERGED) & far).sum())
            reached += int((~far).sum())
            scale = torch.linalg.matrix_norm(h.double(), 2) / b.double().norm(dim=1)
            assert (got.value.double().norm(dim=1) * scale).max() < 1e15
            for matrix, rhs in zip(h[:20].numpy(), b[:20].numpy(), strict=True):
                x, failed = PEERS[solver](matrix, rhs, rtol=rtol, maxiter=4 * dim)
                x = torch.from_numpy(x)[None]
                residual = relative_residual(*map(torch.from_numpy, (matrix[None], rhs[None])), x)
                scipys += int(not failed and residual.item() > 3 * rtol)
    assert ours == 0
    if outside and (solver == "minres" or smallest == 1e-11):
        assert scipys > 0  # the systems are hard
    assert outside or reached > 550  # of 600 systems that have a solution


FORMS = ["plain", "float", "diagonal", "dense", "damping", "preconditioner", "x0"]


@pytest.mark.parametrize("form", FORMS)
def test_cg_on_a_singular_system_returns_the_solution_without_h(form):
    # A = H + Λ + damping I is singular and b is outside its range.
    b, eye = torch.ones(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    diagonal = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)
    lam, matrix, arguments = 0.0, 0 * eye, {}
    if form == "float":
        lam, matrix = 0.5, 0.5 * eye
    elif form == "diagonal":
        lam, matrix = diagonal, torch.diag(diagonal)
    elif form == "dense":
        lam = matrix = SINGULAR + eye
    elif form == "damping":
        arguments = {"damping": 0.25}
    elif form == "preconditioner":
        arguments = {"preconditioner": diagonal}
    elif form == "x0":
        lam, matrix = 0.5, 0.5 * eye
        arguments = {"x0": torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)}
    h = SINGULAR - matrix - arguments.get("damping", 0.0) * eye
    got = conjugate_gradient(lambda p: p @ h, b, lam=lam, max_iter=8, rtol=1e-2, **arguments)
    x0 = arguments.get("x0", torch.zeros_like(b))
    assert got.status.item() == Status.NEGATIVE_CURVATURE
    assert got.error_estimate.item() > 1e12
    if got.steps.item() > 0:  # rounding made the curvature negative: the previous iterate
        residual = b - got.value @ SINGULAR
        assert got.value.norm() < 10
    else:
        residual = b - x0 @ SINGULAR
        step = torch.linalg.solve(matrix, residual.T).T if matrix.any() else 0.0
        torch.testing.assert_close(got.value, x0 + step)
    torch.testing.assert_close(got.residual, residual.norm(dim=1))


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_cg_does_not_return_an_x_without_a_correct_digit(rtol, dtype, device):
    # The curvature of the second direction is 1e-17, positive, and x would be 1e17.
    h = torch.tensor([[1.0, 1e-17]], dtype=dtype, device=device)
    b = torch.ones(1, 2, dtype=dtype, device=device)
    got = conjugate_gradient(lambda p: h * p, b, max_iter=5, rtol=rtol)
    assert got.status.item() == Status.NEGATIVE_CURVATURE
    assert got.steps.item() == 0
    assert not got.value.any()
    torch.testing.assert_close(got.residual.item(), 2**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_minres_stops_at_the_least_squares_solution(rtol):
    b = torch.tensor([[1.0, 2, 1]], dtype=torch.float64)
    got = MINRES(max_iter=8, rtol=rtol).solve(lambda p: p @ LEAST_SQUARES, b)
    assert got.status.item() == Status.MAX_ITER
    torch.testing.assert_close(got.residual.item(), 1.0)
    torch.testing.assert_close((b - got.value @ LEAST_SQUARES)[0], torch.eye(3).double()[2])
    assert got.value.norm() < 2
    assert got.error_estimate.item() > 1e12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("decades", [3, 4, 5])
def test_float32_systems_are_reported_by_their_true_residual(solver, decades, device):
    h = symmetric(torch.logspace(-decades, 0, 60, dtype=torch.float64).expand(20, -1)).float()
    h, b = h.to(device), torch.randn(20, 60, device=device)
    got = SOLVERS[solver](max_iter=900, rtol=1e-4).solve(product(h), b)
    true = relative_residual(h, b, got.value)
    converged = got.status == Status.CONVERGED
    assert (true[converged] < 2.1e-4).all()
    assert (true[~converged] > 1.5e-4).all()
    assert converged.all() if decades == 3 else not converged.all()
    said = got.residual / b.norm(dim=1)
    torch.testing.assert_close(said[~converged], true[~converged], rtol=0.2, atol=0)


def test_a_neumann_series_is_reported_by_its_true_residual(device):
    eigenvalues = torch.tensor([1.0, 1e-2], dtype=torch.float64).repeat(4, 10)
    h = symmetric(eigenvalues).float().to(device)
    b = torch.randn(4, 20, device=device)
    got = NeumannSeries(max_iter=2500, lr=1.0, rtol=1e-6).solve(product(h), b)
    true = relative_residual(h, b, got.value)
    converged = got.status == Status.CONVERGED
    assert not converged.any()  # |A| |x| eps is 1e-5
    torch.testing.assert_close(got.residual / b.norm(dim=1), true, rtol=0.5, atol=0)


# ---- what it costs


def counted(h):
    calls = []
    return calls, lambda p: calls.append(1) or product(h)(p)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_solve_without_a_tolerance_takes_no_further_product(solver, recorded, dtype):
    h = symmetric(torch.rand(5, 30, dtype=dtype) + 0.1)
    calls, matvec = counted(h)
    for b in (torch.randn(5, 30, dtype=dtype), h[:, 0]):
        calls.clear()
        if recorded:
            with recording():
                SOLVERS[solver]().solve(matvec, b)
        else:
            SOLVERS[solver]().solve(matvec, b)
        assert len(calls) == 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_well_conditioned_solve_takes_no_further_product(solver, dtype):
    h = symmetric(torch.linspace(1, 3, 30, dtype=dtype).expand(5, -1))
    calls, matvec = counted(h)
    got = SOLVERS[solver](max_iter=50, rtol=1e-3).solve(matvec, torch.randn(5, 30, dtype=dtype))
    assert (got.status == Status.CONVERGED).all()
    assert len(calls) == got.steps.max()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_recorded_solve_with_a_tolerance_takes_one_further_product(solver):
    h, b = singular_systems(12, 30, True, 1e-11)
    calls, matvec = counted(h)
    plain = SOLVERS[solver](max_iter=20, rtol=1e-8).solve(matvec, b)
    calls.clear()
    with recording():
        got = SOLVERS[solver](max_iter=20, rtol=1e-8).solve(matvec, b)
    assert len(calls) == 21
    for name in ("value", "status", "steps", "residual"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
