"""MINRES against dense solves, known spectra and SciPy; see also test_linear.py."""

import numpy as np
import torch
from matrices import product, symmetric
from scipy.sparse.linalg import minres as scipy_minres

from imaml_ext import MINRES, ConjugateGradient, Status


def indefinite(rows, dim, device):
    eigenvalues = torch.rand(rows, dim, dtype=torch.float64, device=device) * 3 + 0.5
    eigenvalues[:, : dim // 3] *= -1
    return symmetric(eigenvalues)


def test_minres_solves_indefinite_systems_where_cg_stops(device):
    h = indefinite(16, 30, device)
    b = torch.randn(16, 30, dtype=torch.float64, device=device)
    got = MINRES(max_iter=200, rtol=1e-10).solve(product(h), b)
    assert (got.status == Status.CONVERGED).all()
    torch.testing.assert_close(got.value, torch.linalg.solve(h, b), rtol=1e-7, atol=1e-8)
    cg = ConjugateGradient(max_iter=200, rtol=1e-10).solve(product(h), b)
    assert (cg.status == Status.NEGATIVE_CURVATURE).all()


def test_every_minres_iterate_agrees_with_scipy():
    h = indefinite(1, 30, "cpu")
    b = torch.randn(1, 30, dtype=torch.float64)
    for steps in (1, 2, 5, 12):
        want, _ = scipy_minres(h[0].numpy(), b[0].numpy(), rtol=0, maxiter=steps)
        got = MINRES(max_iter=steps).solve(product(h), b)
        np.testing.assert_allclose(got.value[0].numpy(), want, rtol=1e-8, atol=1e-10)
        assert got.steps.item() == steps
        assert got.status.item() == Status.MAX_ITER


def test_minres_ritz_values_are_the_spectrum_once_the_krylov_space_is_exhausted(device):
    distinct = torch.tensor([-3.0, -0.5, 2.0, 7.0], dtype=torch.float64, device=device)
    h = symmetric(distinct.repeat(3, 5))
    b = torch.randn(3, 20, dtype=torch.float64, device=device)
    got = MINRES(max_iter=4).solve(product(h), b)
    torch.testing.assert_close(got.lanczos.ritz, distinct.expand(3, 4), rtol=1e-8, atol=0)
    assert (got.error_estimate == torch.inf).all()  # A is indefinite


def test_a_singular_system_ends_at_the_smallest_residual(device):
    h = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, device=device)).expand(
        2, 3, 3
    )
    b = torch.tensor([[0.0, 1.0, 1.0], [3.0, 1.0, 1.0]], dtype=torch.float64, device=device)
    got = MINRES(max_iter=10, rtol=1e-10).solve(product(h), b)
    assert got.status.tolist() == [Status.CONVERGED, Status.MAX_ITER]
    torch.testing.assert_close(got.residual[1].item(), 3.0)
    assert got.value.isfinite().all()
    assert got.error_estimate[1] > 1e12


def test_minres_stops_at_its_tolerance_and_not_before(device):
    h = indefinite(4, 40, device)
    b = torch.randn(4, 40, dtype=torch.float64, device=device)
    got = MINRES(max_iter=200, rtol=1e-3).solve(product(h), b)
    true = (b - product(h)(got.value)).norm(dim=1)
    assert (true <= 1.001e-3 * b.norm(dim=1)).all()
    torch.testing.assert_close(got.residual, true, rtol=1e-6, atol=0)
    for row in range(4):
        fewer = MINRES(max_iter=int(got.steps[row]) - 1).solve(product(h), b)
        assert fewer.residual[row] > 1e-3 * b[row].norm()
