"""Batched conjugate gradient against dense solves, known spectra and SciPy."""

import numpy as np
import pytest
import torch
from matrices import product, symmetric
from scipy.sparse.linalg import cg as scipy_cg

from imaml_ext import Status, conjugate_gradient


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (16, 50), (3, 1)])
def test_the_solution_agrees_with_a_dense_solve(shape, device):
    h = symmetric(torch.rand(shape, dtype=torch.float64, device=device) * 10)
    b = torch.randn(shape, dtype=torch.float64, device=device)
    lam = torch.rand(shape[1], dtype=torch.float64, device=device) + 0.5
    got = conjugate_gradient(product(h), b, lam=lam, damping=0.3, max_iter=4 * shape[1], rtol=1e-12)
    a = h + torch.diag(lam) + 0.3 * torch.eye(shape[1], dtype=torch.float64, device=device)
    assert (got.status == Status.CONVERGED).all()
    torch.testing.assert_close(got.value, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)


def test_every_iterate_agrees_with_scipy():
    h = symmetric(torch.logspace(0, 3, 30, dtype=torch.float64)[None])
    b = torch.randn(1, 30, dtype=torch.float64)
    for steps in (1, 2, 5, 12):
        want, _ = scipy_cg(h[0].numpy(), b[0].numpy(), rtol=0, atol=0, maxiter=steps)
        got = conjugate_gradient(product(h), b, max_iter=steps)
        np.testing.assert_allclose(got.value[0].numpy(), want, rtol=1e-9, atol=1e-12)
        assert got.status.item() == Status.MAX_ITER
        assert got.steps.item() == steps


def test_a_lam_that_rounds_to_0_counts_as_0():
    b = torch.ones(1, 3)
    got = conjugate_gradient(lambda p: 2 * p, b, lam=1e-60, max_iter=2)
    torch.testing.assert_close(got.value, b / 2)


def test_float32_solutions_have_float32_accuracy(device):
    h = symmetric(torch.rand(8, 40, device=device) * 10 + 1)
    b = torch.randn(8, 40, device=device)
    got = conjugate_gradient(product(h), b, max_iter=60, rtol=1e-6)
    want = torch.linalg.solve(h.double(), b.double())
    assert ((got.value - want).norm(dim=1) / want.norm(dim=1)).max() < 1e-5


def test_a_hard_row_is_not_hidden_by_easy_ones(device):
    # Stopping on the mean residual of the batch would leave row 15 unsolved.
    eigenvalues = torch.ones(16, 50, dtype=torch.float64, device=device)
    eigenvalues[15] = torch.logspace(0, 4, 50)
    h = symmetric(eigenvalues)
    b = torch.randn(16, 50, dtype=torch.float64, device=device)
    got = conjugate_gradient(product(h), b, max_iter=500, rtol=1e-8)
    assert (got.status == Status.CONVERGED).all()
    assert got.steps[15] > got.steps[:15].max()
    torch.testing.assert_close(got.value, torch.linalg.solve(h, b), rtol=1e-6, atol=1e-8)


def test_a_failing_row_does_not_change_the_others(device):
    eigenvalues = torch.rand(16, 30, dtype=torch.float64, device=device) + 1
    good = symmetric(eigenvalues)
    b = torch.randn(16, 30, dtype=torch.float64, device=device)
    alone = conjugate_gradient(product(good), b, max_iter=10)
    bad = good.clone()
    bad[7] = torch.nan
    got = conjugate_gradient(product(bad), b, max_iter=10)
    others = torch.arange(16, device=device) != 7
    assert got.status[7] == Status.NONFINITE
    assert (got.value[7] == 0).all()
    assert torch.equal(got.value[others], alone.value[others])
    assert torch.equal(got.steps[others], alone.steps[others])


def test_negative_curvature_in_the_first_iteration_gives_the_solution_without_h(dtype, device):
    b = torch.randn(3, 20, dtype=dtype, device=device)
    lam = torch.rand(20, dtype=dtype, device=device) + 0.5
    got = conjugate_gradient(lambda p: -100 * p, b, lam=lam, damping=0.5, max_iter=5)
    assert (got.status == Status.NEGATIVE_CURVATURE).all()
    assert (got.steps == 0).all()
    torch.testing.assert_close(got.value, b / lam)
    assert (got.error_estimate == torch.inf).all()


def test_negative_curvature_later_keeps_the_previous_iterate(device):
    eigenvalues = torch.linspace(1, 3, 40, dtype=torch.float64, device=device)[None].clone()
    eigenvalues[0, 0] = -0.5
    h = symmetric(eigenvalues)
    b = torch.randn(1, 40, dtype=torch.float64, device=device)
    got = conjugate_gradient(product(h), b, max_iter=40, rtol=1e-12)
    assert got.status.item() == Status.NEGATIVE_CURVATURE
    steps = got.steps.item()
    assert steps > 0
    before = conjugate_gradient(product(h), b, max_iter=steps)
    assert torch.equal(got.value, before.value)
    assert got.lanczos.smallest.item() < 0


def test_without_lam_negative_curvature_in_the_first_iteration_keeps_x0(device):
    b = torch.randn(2, 5, dtype=torch.float64, device=device)
    got = conjugate_gradient(lambda p: -p, b, max_iter=3)
    assert (got.value == 0).all()
    assert (got.status == Status.NEGATIVE_CURVATURE).all()


def test_a_zero_right_hand_side_takes_no_steps(dtype, device):
    b = torch.randn(3, 7, dtype=dtype, device=device)
    b[1] = 0
    got = conjugate_gradient(lambda p: 2 * p, b, max_iter=5, rtol=1e-6)
    assert got.status.tolist() == [Status.CONVERGED] * 3
    assert got.steps.tolist() == [1, 0, 1]
    assert (got.value[1] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_a_nonfinite_right_hand_side_is_nonfinite(value, device):
    b = torch.randn(3, 7, device=device)
    b[2, 3] = value
    got = conjugate_gradient(lambda p: 2 * p, b, max_iter=5)
    assert got.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    assert got.value.isfinite().all()
    assert got.residual[2].isnan()


@pytest.mark.parametrize(
    ("eigenvalues", "b", "lam"),
    [
        ([0.0, 0.0], [1e10, 1e10], 1e-30),  # alpha overflows float32
        ([1e-25, 1.0], [1e30, 1e10], 0.0),  # alpha p overflows
        ([-1.0, -1.0], [10.0, 10.0], 1e-38),  # p / lam overflows
    ],
)
def test_a_solution_that_overflows_is_reported_as_nonfinite(eigenvalues, b, lam, device):
    h = torch.tensor([eigenvalues], device=device)
    got = conjugate_gradient(lambda p: h * p, torch.tensor([b], device=device), lam=lam, max_iter=1)
    assert got.status.item() == Status.NONFINITE
    assert (got.value == 0).all()
    assert got.residual.isnan().all()


def test_matvec_may_use_autograd_with_and_without_x0(device):
    weight = torch.randn(1, 6, device=device)

    def matvec(p):
        q = p.detach().requires_grad_()
        (grad,) = torch.autograd.grad(((q * weight) ** 2).sum() / 2, q)
        return grad

    b = torch.randn(1, 6, device=device)
    for x0 in (None, torch.zeros_like(b)):
        got = conjugate_gradient(matvec, b, lam=1.0, max_iter=6, x0=x0)
        torch.testing.assert_close(got.value, b / (weight**2 + 1), rtol=1e-4, atol=1e-5)


def test_scaling_the_system_scales_the_solution(device):
    # An absolute threshold of curvature would reject the second system.
    h = symmetric(torch.rand(4, 20, dtype=torch.float64, device=device) + 0.1)
    b = torch.randn(4, 20, dtype=torch.float64, device=device)
    plain = conjugate_gradient(product(h), b, max_iter=100, rtol=1e-10)
    small = conjugate_gradient(product(h * 2.0**-80), b, max_iter=100, rtol=1e-10)
    assert (small.status == Status.CONVERGED).all()
    torch.testing.assert_close(small.value * 2.0**-80, plain.value)


def test_a_solve_starts_at_x0(device):
    h = symmetric(torch.rand(4, 20, dtype=torch.float64, device=device) + 1)
    b = torch.randn(4, 20, dtype=torch.float64, device=device)
    exact = torch.linalg.solve(h + 0.5 * torch.eye(20, dtype=torch.float64, device=device), b)
    cold = conjugate_gradient(product(h), b, lam=0.5, max_iter=50, rtol=1e-10)
    warm = conjugate_gradient(product(h), b, lam=0.5, max_iter=50, rtol=1e-10, x0=exact + 1e-6)
    torch.testing.assert_close(warm.value, exact, rtol=1e-8, atol=1e-8)
    assert (warm.steps < cold.steps).all()


def test_ritz_values_are_the_spectrum_once_the_krylov_space_is_exhausted(device):
    distinct = torch.tensor([0.5, 2.0, 7.0, 11.0], dtype=torch.float64, device=device)
    h = symmetric(distinct.repeat(3, 5))
    b = torch.randn(3, 20, dtype=torch.float64, device=device)
    got = conjugate_gradient(product(h), b, lam=1.0, max_iter=4)
    torch.testing.assert_close(got.lanczos.ritz, (distinct + 1).expand(3, 4), rtol=1e-8, atol=0)


def test_ritz_values_lie_inside_the_spectrum(device):
    eigenvalues = torch.rand(5, 60, dtype=torch.float64, device=device) * 9 + 1
    h = symmetric(eigenvalues)
    b = torch.randn(5, 60, dtype=torch.float64, device=device)
    for steps in (1, 3, 10):
        seen = conjugate_gradient(product(h), b, max_iter=steps).lanczos
        assert (seen.smallest >= eigenvalues.amin(1) - 1e-9).all()
        assert (seen.largest <= eigenvalues.amax(1) + 1e-9).all()


def test_the_error_estimate_bounds_the_error_once_the_smallest_eigenvalue_is_found(device):
    h = symmetric(torch.logspace(-1, 1, 12, dtype=torch.float64, device=device).expand(4, -1))
    b = torch.randn(4, 12, dtype=torch.float64, device=device)
    exact = torch.linalg.solve(h, b)
    got = conjugate_gradient(product(h), b, max_iter=11)
    error = (got.value - exact).norm(dim=1)
    assert (error <= got.error_estimate * (1 + 1e-6)).all()
    assert (got.error_estimate <= 200 * error).all()  # kappa = 100


def test_describe_names_the_tasks_and_the_remedy():
    b = torch.ones(3, 2)
    scale = torch.tensor([[1.0], [-1.0], [float("nan")]])
    text = conjugate_gradient(lambda p: scale * p, b, max_iter=3).describe()
    assert "NEGATIVE_CURVATURE: 1 of 3 tasks: 1 (" in text
    assert "curvature='ggn'" in text
    assert "NONFINITE: 1 of 3 tasks: 2 (" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"rtol": -1.0}, "rtol must be finite and non-negative, got -1.0"),
        ({"atol": float("nan")}, "atol must be finite"),
        ({"damping": float("inf")}, "damping must be finite"),
        ({"lam": float("nan")}, "lam must be finite, got nan"),
        ({"lam": torch.ones(3)}, r"lam must be a scalar, \[4\], \[4, 4\], \[2, 1\] or \[2, 4\]"),
        ({"b": torch.ones(4)}, r"b must be \[B, D\]"),
        ({"b": torch.ones(2, 4, dtype=torch.int64)}, "float32 or float64"),
        ({"x0": torch.ones(4)}, r"x0 must be \[2, 4\]"),
    ],
)
def test_bad_settings_are_rejected(settings, message):
    arguments = {"b": torch.ones(2, 4), "max_iter": 3} | settings
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda p: p, **arguments)


def test_a_product_of_the_wrong_shape_is_rejected():
    with pytest.raises(ValueError, match=r"the result of matvec must be \["):
        conjugate_gradient(lambda p: p[:, :2], torch.ones(2, 4), max_iter=3)
