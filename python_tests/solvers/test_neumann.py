"""The Neumann series against its sum; see also test_linear.py."""

import torch
from matrices import product, symmetric

from imaml_ext import NeumannSeries, Status


def test_the_neumann_series_is_the_sum_of_its_terms(device):
    h = symmetric(torch.rand(3, 10, dtype=torch.float64, device=device) * 2)
    b = torch.randn(3, 10, dtype=torch.float64, device=device)
    a = h + 0.5 * torch.eye(10, dtype=torch.float64, device=device)
    contraction = torch.eye(10, dtype=torch.float64, device=device) - 0.2 * a
    powers = [torch.linalg.matrix_power(contraction, k) for k in range(6)]
    want = 0.2 * product(sum(powers))(b)
    got = NeumannSeries(max_iter=6, lr=0.2).solve(product(h), b, 0.5)
    torch.testing.assert_close(got.value, want)
    assert (got.status == Status.MAX_ITER).all()


def test_the_residual_of_a_diverging_series_grows(device):
    b = torch.randn(2, 5, device=device)
    got = NeumannSeries(max_iter=10, lr=1.0).solve(lambda p: 5 * p, b)
    assert (got.residual > 100 * b.norm(dim=1)).all()
    assert (got.status == Status.MAX_ITER).all()
    forever = NeumannSeries(max_iter=500, lr=1.0).solve(lambda p: 5 * p, b)
    assert (forever.status == Status.NONFINITE).all()
    assert (forever.value == 0).all()
