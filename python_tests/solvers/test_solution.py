"""Ritz values, error estimates and reports of solutions against hand-made matrices."""

import pytest
import torch

from imaml_ext import Lanczos, Solution, Status
from imaml_ext.solvers.solution import all_done


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def solution(status=(Status.MAX_ITER,), lanczos=None, residual=(0.1,), value=((1.0, 0.0),)):
    status = torch.tensor(status, dtype=torch.int32)
    return Solution(tensor(value), status, torch.ones_like(status), tensor(residual), lanczos)


def test_ritz_values_are_the_eigenvalues_of_the_tridiagonal_matrix():
    diagonal, link = tensor([[2.0, 5.0, 1.0]]).T, tensor([[0.5, -3.0]]).T
    want = torch.linalg.eigvalsh(tensor([[2.0, 0.5, 0.0], [0.5, 5.0, -3.0], [0.0, -3.0, 1.0]]))
    got = Lanczos(diagonal, link, torch.tensor([3]))
    torch.testing.assert_close(got.ritz[0], want)
    torch.testing.assert_close(got.smallest, want[:1])
    torch.testing.assert_close(got.largest, want[2:])


def test_each_task_uses_only_its_own_iterations():
    diagonal = tensor([[2.0, 99.0, 99.0], [2.0, 5.0, 99.0], [9.0, 9.0, 9.0]]).T
    link = tensor([[99.0, 99.0], [1.0, 99.0], [9.0, 9.0]]).T
    got = Lanczos(diagonal, link, torch.tensor([1, 2, 0])).ritz
    assert torch.equal(got[0], tensor([2.0, 2.0, 2.0]))
    two = torch.linalg.eigvalsh(tensor([[2.0, 1.0], [1.0, 5.0]]))
    torch.testing.assert_close(got[1].min(), two[0])
    torch.testing.assert_close(got[1].max(), two[1])
    assert got[2].isnan().all()


def test_the_matrix_follows_from_the_coefficients_of_conjugate_gradient():
    # In exact arithmetic, three iterations on a 3 x 3 system find the whole spectrum.
    a = torch.diag(tensor([1.0, 4.0, 10.0]))
    r = p = tensor([1.0, 2.0, -1.0])
    curvature, beta = [], []
    for _ in range(3):
        ap = a @ p
        curvature.append(p @ ap / (r @ r))
        new = r - (r @ r) / (p @ ap) * ap
        beta.append(new @ new / (r @ r))
        p = new + beta[-1] * p
        r = new
    got = Lanczos.of_conjugate_gradient(
        torch.stack(curvature)[:, None], torch.stack(beta)[:, None], torch.tensor([3]), None
    )
    torch.testing.assert_close(got.ritz[0], tensor([1.0, 4.0, 10.0]))
    torch.testing.assert_close(got.shifted(2.0).shifted(0.5).ritz[0], tensor([3.5, 6.5, 12.5]))


def test_ritz_values_are_scaled_and_then_shifted():
    one = Lanczos(tensor([[2.0]]), tensor([]).reshape(0, 1), torch.tensor([1]), tensor([3.0]), 1.0)
    assert one.ritz.item() == 7.0


def test_the_error_estimate_is_the_residual_over_the_smallest_ritz_value():
    def estimate(mu, largest, residual):
        lanczos = Lanczos(tensor([[mu], [largest]]), tensor([[0.0]]), torch.tensor([2]))
        return solution(lanczos=lanczos, residual=(residual,)).error_estimate.item()

    assert estimate(0.5, 4.0, 0.1) == pytest.approx(0.2)
    assert estimate(-0.5, 4.0, 0.1) == float("inf")
    assert estimate(0.0, 4.0, 0.1) == float("inf")
    # |value| = 1: the rounding error of the residual is at least eps |A|.
    assert estimate(0.5, 4.0, 0.0) == pytest.approx(8 * torch.finfo(torch.float64).eps)


def test_without_measured_curvature_there_is_no_error_estimate():
    with pytest.raises(ValueError, match=r"the linear solver measured no curvature.*lanczos="):
        _ = solution().error_estimate


def test_describe_lists_the_tasks_of_each_status():
    status = [Status.CONVERGED] * 10 + [Status.NONFINITE, Status.MAX_ITER]
    text = solution(status, value=[[0.0]] * 12, residual=[0.0] * 12).describe()
    assert "CONVERGED: 10 of 12 tasks: 0, 1, 2, 3, 4, 5, 6, 7, ...; " in text
    assert "MAX_ITER: 1 of 12 tasks: 11 (not converged: check residual)" in text
    assert "NONFINITE: 1 of 12 tasks: 10 (" in text
    assert "NEGATIVE_CURVATURE" not in text


def test_a_batch_is_done_when_no_task_is_running():
    assert all_done(torch.tensor([Status.CONVERGED, Status.NONFINITE]), 0)
    assert not all_done(torch.tensor([Status.CONVERGED, Status.RUNNING]), 0)
