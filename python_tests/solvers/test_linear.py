"""Every linear solver against dense solves, and each against a specific oracle.

Tests of one solver only are in test_cg.py, test_minres.py and test_neumann.py.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from matrices import product, symmetric
from problems import regression

from imaml_ext import (
    MINRES,
    ConjugateGradient,
    LinearSolver,
    NeumannSeries,
    Solution,
    Status,
    conjugate_gradient,
    implicit_meta_grad,
)
from imaml_ext.problem.programs import Programs

SOLVERS = {
    "cg": lambda **s: ConjugateGradient(max_iter=300, **s),
    "jacobi": lambda **s: ConjugateGradient(max_iter=300, preconditioner="jacobi", **s),
    "adam": lambda **s: ConjugateGradient(max_iter=300, preconditioner="adam", **s),
    "minres": lambda **s: MINRES(max_iter=300, **s),
    "neumann": lambda **s: NeumannSeries(max_iter=3000, lr=0.05, **s),
}
LAMS = ["float", "0-d", "diagonal", "dense"]


@pytest.fixture(params=list(SOLVERS))
def make(request):
    return SOLVERS[request.param]


def make_lam(form, dim, dtype, device):
    """lam in one of its forms, and as a matrix."""
    eye = torch.eye(dim, dtype=dtype, device=device)
    if form == "float":
        return 0.7, 0.7 * eye
    if form == "0-d":
        return torch.tensor(0.7, dtype=dtype, device=device), 0.7 * eye
    if form == "diagonal":
        diagonal = torch.rand(dim, dtype=dtype, device=device) + 0.5
        return diagonal, torch.diag(diagonal)
    dense = symmetric(torch.rand(dim, dtype=dtype, device=device) + 0.5)
    dense = 0.5 * (dense + dense.T)
    return dense, dense


def solve(solver, h, b, lam=0.0):
    return solver.solve(product(h), b, lam, second_moment=torch.rand_like(b) + 0.1)


@pytest.mark.parametrize("form", LAMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (16, 30)])
def test_the_solution_agrees_with_a_dense_solve(make, form, shape, device):
    h = symmetric(torch.rand(shape, dtype=torch.float64, device=device) * 10)
    b = torch.randn(shape, dtype=torch.float64, device=device)
    lam, matrix = make_lam(form, shape[1], torch.float64, device)
    got = solve(make(rtol=1e-11, damping=0.3), h, b, lam)
    a = h + matrix + 0.3 * torch.eye(shape[1], dtype=torch.float64, device=device)
    assert (got.status == Status.CONVERGED).all()
    torch.testing.assert_close(got.value, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-9)
    residual = (b - product(a)(got.value)).norm(dim=1)
    torch.testing.assert_close(got.residual, residual, rtol=0.5, atol=1e-12)


def test_float32_solutions_have_float32_accuracy(make, device):
    h = symmetric(torch.rand(8, 40, device=device) * 10 + 1)
    b = torch.randn(8, 40, device=device)
    got = solve(make(rtol=3e-6), h, b)
    want = torch.linalg.solve(h.double(), b.double())
    assert (got.status == Status.CONVERGED).all()
    assert ((got.value - want).norm(dim=1) / want.norm(dim=1)).max() < 2e-5


def test_a_zero_right_hand_side_takes_no_steps(make, dtype, device):
    b = torch.randn(3, 7, dtype=dtype, device=device)
    b[1] = 0
    got = solve(make(rtol=1e-4), 2 * torch.eye(7, dtype=dtype, device=device), b)
    assert got.status.tolist() == [Status.CONVERGED] * 3
    assert got.steps[1] == 0
    assert (got.value[1] == 0).all()
    torch.testing.assert_close(got.value[0], b[0] / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_failing_row_does_not_change_the_others(make, value, device):
    good = symmetric(torch.rand(16, 30, dtype=torch.float64, device=device) + 1)
    b = torch.randn(16, 30, dtype=torch.float64, device=device)
    solver = make(rtol=1e-6)
    second_moment = torch.rand_like(b)
    alone = solver.solve(product(good), b, 0.5, second_moment=second_moment)
    bad = good.clone()
    bad[7] = value
    got = solver.solve(product(bad), b, 0.5, second_moment=second_moment)
    others = torch.arange(16, device=device) != 7
    assert got.status[7] == Status.NONFINITE
    assert (got.value[7] == 0).all()
    assert got.residual[7].isnan()
    assert torch.equal(got.value[others], alone.value[others])
    assert torch.equal(got.steps[others], alone.steps[others])


def test_a_row_with_a_nonfinite_right_hand_side_is_nonfinite(make, device):
    b = torch.randn(3, 7, device=device)
    b[2, 3] = torch.nan
    got = solve(make(rtol=1e-4), 2 * torch.eye(7, device=device), b)
    assert got.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    assert (got.value[2] == 0).all()


@pytest.mark.parametrize("solver", ["cg", "jacobi", "adam", "neumann"])
@pytest.mark.parametrize("form", LAMS)
def test_negative_curvature_at_the_start_gives_the_solution_without_h(solver, form, device):
    b = torch.randn(3, 20, dtype=torch.float64, device=device)
    lam, matrix = make_lam(form, 20, b.dtype, device)
    h = -100 * torch.eye(20, dtype=b.dtype, device=device)
    got = solve(SOLVERS[solver](), h, b, lam)
    assert (got.status == Status.NEGATIVE_CURVATURE).all()
    assert (got.steps == 0).all()
    torch.testing.assert_close(got.value, torch.linalg.solve(matrix, b.T).T)


# ---- an initial x


@pytest.mark.parametrize("form", LAMS)
def test_a_solve_from_any_x0_gives_the_same_solution(make, form, device):
    h = symmetric(torch.rand(4, 12, dtype=torch.float64, device=device) * 10 + 1)
    b = torch.randn(4, 12, dtype=torch.float64, device=device)
    lam, matrix = make_lam(form, 12, torch.float64, device)
    want = torch.linalg.solve(h + matrix, b)
    x0 = torch.randn_like(b)
    x0[0] = want[0]
    x0[1] = torch.nan
    x0[2] = 1e9  # no better than 0
    moment = torch.rand_like(b) + 0.1
    solver = make(rtol=1e-10)
    got = solver.solve(product(h), b, lam, x0=x0, second_moment=moment)
    cold = solver.solve(product(h), b, lam, second_moment=moment)
    assert (got.status == Status.CONVERGED).all()
    torch.testing.assert_close(got.value, want, rtol=1e-8, atol=1e-8)
    residual = (b - product(h + matrix)(got.value)).norm(dim=1)
    assert (residual <= 2e-10 * b.norm(dim=1)).all()
    assert got.steps[0] == 0
    assert (got.steps[1:3] == cold.steps[1:3]).all()  # from 0, as without x0
    assert torch.equal(got.value[1:3], cold.value[1:3])


def test_the_tolerance_is_relative_to_b_whatever_x0_is(make, device):
    h = symmetric(torch.rand(3, 12, dtype=torch.float64, device=device) * 10 + 1)
    b = torch.randn(3, 12, dtype=torch.float64, device=device)
    moment = torch.rand_like(b) + 0.1
    close = torch.linalg.solve(h, b) + 1e-5
    warm = make(rtol=1e-6).solve(product(h), b, x0=close, second_moment=moment)
    cold = make(rtol=1e-6).solve(product(h), b, second_moment=moment)
    residual = (b - product(h)(warm.value)).norm(dim=1)
    assert (residual <= 2e-6 * b.norm(dim=1)).all()
    assert (warm.steps < cold.steps).all()


def test_negative_curvature_in_the_first_iteration_ignores_x0(device):
    # x0 is better than 0, but theta's gradient Λ x is to be that of first-order methods.
    b = torch.ones(1, 3, dtype=torch.float64, device=device)
    solver = ConjugateGradient(max_iter=4)
    got = solver.solve(lambda p: -3 * p, b, 2.0, x0=-0.5 * b)
    assert got.status.item() == Status.NEGATIVE_CURVATURE
    torch.testing.assert_close(got.value, b / 2)
    torch.testing.assert_close(got.residual, b.norm(dim=1))


def test_an_invalid_x0_is_refused(make):
    for x0 in (torch.ones(3), torch.ones(2, 3).double()):
        with pytest.raises(ValueError, match=r"x0 must be \[2, 3\] torch.float32"):
            make().solve(lambda p: p, torch.ones(2, 3), x0=x0)


# ---- a user's own solver


@dataclass(frozen=True)
class Richardson(LinearSolver):
    """Claims a status that it does not compute, and lets rows diverge."""

    claimed: Status = Status.RUNNING

    def _solve(self, system):
        x = torch.zeros_like(system.b)
        for _ in range(self.max_iter):
            x = x + 0.1 * (system.b - system.product(x))
        steps = torch.full(x.shape[:1], self.max_iter, dtype=torch.int32)
        residual = (system.b - system.product(x)).norm(dim=1).double()
        return Solution(x, torch.full_like(steps, self.claimed), steps, residual)


@pytest.mark.parametrize("form", LAMS)
def test_a_subclass_implements_only_its_iteration(form):
    h = symmetric(torch.rand(3, 10, dtype=torch.float64) * 5 + 1)
    h[2] *= 1e3  # diverges
    b = torch.randn(3, 10, dtype=torch.float64)
    lam, matrix = make_lam(form, 10, torch.float64, "cpu")
    got = Richardson(max_iter=500, damping=0.2).solve(product(h), b, lam)
    assert got.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    a = h + matrix + 0.2 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(got.value[:2], torch.linalg.solve(a[:2], b[:2]))
    assert (got.value[2] == 0).all()
    assert got.residual[2].isnan()


@pytest.mark.parametrize("claimed", [Status.RUNNING, Status.CONVERGED])
@pytest.mark.parametrize(
    ("settings", "residual", "reached"),
    [
        ({"rtol": 0.1}, 0.09, True),
        ({"rtol": 0.1}, 0.15, None),  # as claimed
        ({"rtol": 0.1}, 0.3, False),
        ({"atol": 1.0}, 0.09, True),
        ({"atol": 1.0}, 0.3, False),
        ({}, 0.09, False),
        ({}, 1e-14, True),
    ],
)
def test_the_status_of_a_subclass_agrees_with_its_residual(claimed, settings, residual, reached):
    """|b| = 10, and k steps with the identity leave the residual 0.9^k |b|."""
    steps = round(math.log(residual) / math.log(0.9))
    b = torch.full((1, 4), 5.0, dtype=torch.float64)
    wanted = claimed == Status.CONVERGED if reached is None else reached
    for x0, saved in ((None, 0), (0.5 * b, 6)):
        solver = Richardson(max_iter=steps - saved, claimed=claimed, **settings)
        status = solver.solve(lambda p: p, b, x0=x0).status.item()
        assert status == (Status.CONVERGED if wanted else Status.MAX_ITER)


class Halved(ConjugateGradient):
    """Changes what the inherited iteration returns, in one row to NaN."""

    def _solve(self, system):
        found = super()._solve(system)
        x = 0.5 * found.value
        residual = (system.b - system.product(x)).norm(dim=1).double()
        x[1] = torch.nan
        return replace(found, value=x, residual=residual)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_changed_result_of_a_built_in_solver_is_completed_too(recorded):
    problem = regression(3)
    call = (problem.loss, problem.params, problem.support, problem.query)
    solver = Halved(max_iter=50, rtol=1e-8)
    with Programs().use() if recorded else nullcontext():
        for _ in range(3):
            status = implicit_meta_grad(*call, lam=1.0, linear=solver).linear.status
            assert status.tolist() == [Status.MAX_ITER, Status.NONFINITE, Status.MAX_ITER]


@pytest.mark.parametrize("x0", [None, torch.ones(2, 3)])
def test_negative_curvature_at_once_gives_the_solution_without_h(x0):
    class Stopping(LinearSolver):
        def _solve(self, system):
            steps = torch.zeros(2, dtype=torch.int32)
            status = torch.full_like(steps, Status.NEGATIVE_CURVATURE)
            return Solution(0.1 * system.b, status, steps, torch.zeros(2).double())

    b = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]])
    got = Stopping().solve(lambda p: -p, b, 2.0, x0=x0)
    torch.testing.assert_close(got.value, b / 2)
    torch.testing.assert_close(got.residual, b.norm(dim=1).double())


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "the result of Wrong must be an instance of Solution"),
        ({"value": torch.ones(3, 2)}, ValueError, r"Wrong: value must be \[2, 3\] torch.float32"),
        ({"value": torch.ones(2, 3).double()}, ValueError, "got .* torch.float64"),
        ({"status": [1, 1]}, TypeError, "Wrong: status must be an instance of Tensor, got list"),
        ({"status": torch.full((2,), 77)}, ValueError, r"Wrong: status must be \[2\] torch.int32"),
        (
            {"status": torch.full((2,), 77, dtype=torch.int32)}, ValueError,
            "Wrong: status must contain values of Status, got 77",
        ),
        ({"steps": 7}, TypeError, "Wrong: steps must be an instance of Tensor, got"),
        ({"residual": torch.zeros(2)}, ValueError, r"Wrong: residual must be \[2\] torch.float64"),
        ({"lanczos": torch.zeros(2)}, TypeError, "Wrong: lanczos must be an instance of Lanczos"),
    ],
)  # fmt: skip
def test_an_invalid_result_of_a_subclass_is_refused(result, error, message):
    class Wrong(LinearSolver):
        def _solve(self, system):
            steps = torch.zeros(2, dtype=torch.int32)
            valid = Solution(system.b, steps, steps, torch.zeros(2).double())
            return replace(valid, **result) if isinstance(result, dict) else result

    with pytest.raises(error, match=message):
        Wrong().solve(lambda p: p, torch.ones(2, 3))


def test_a_subclass_receives_the_second_moment_and_checked_arguments():
    systems = []

    class Recording(Richardson):
        def _solve(self, system):
            systems.append(system)
            return super()._solve(system)

    b = torch.randn(2, 4, requires_grad=True)
    moment = torch.rand(2, 4)
    Recording().solve(lambda p: p, b, torch.ones(4), second_moment=moment)
    (system,) = systems
    assert system.second_moment is moment
    assert not system.b.requires_grad
    assert torch.equal(system.b, b)
    with pytest.raises(
        ValueError, match=r"lam must be a scalar, \[4\], \[4, 4\], \[2, 1\] or \[2, 4\]"
    ):
        Recording().solve(lambda p: p, b, torch.ones(3))
    with pytest.raises(TypeError, match="matvec must return a tensor, got NoneType"):
        Recording().solve(lambda p: None, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MINRES(max_iter=0), "max_iter must be at least 1, got 0"),
        (lambda: MINRES(curvature="fisher"), "curvature must be one of 'hessian', 'ggn'"),
        (lambda: NeumannSeries(lr=-1.0), "lr must be positive and finite, got -1.0"),
        (
            lambda: ConjugateGradient(preconditioner="ilu"),
            "preconditioner must be one of 'jacobi'",
        ),
        (lambda: ConjugateGradient(probes=0), "probes must be at least 1, got 0"),
        (
            lambda: conjugate_gradient(
                lambda p: p, torch.ones(2, 3), max_iter=1, preconditioner=torch.ones(2)
            ),
            r"preconditioner must be \[2, 3\] or \[3\]",
        ),
        (
            lambda: conjugate_gradient(
                lambda p: p, torch.ones(2, 3), max_iter=1, preconditioner=torch.zeros(3)
            ),
            "preconditioner and its inverse must be positive",
        ),
        (lambda: MINRES().solve(lambda p: p, torch.ones(4)), r"b must be \[B, D\]"),
        (lambda: NeumannSeries().solve(lambda p: p, torch.ones(2, 4), torch.ones(3)), r"\[4, 4\]"),
    ],
)
def test_bad_settings_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
