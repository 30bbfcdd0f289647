"""`cg_step_`: values, statuses and refusals. csrc/tests covers more sizes."""

import pytest
import torch
from row_operands import SHAPES, cg_arguments, tolerance

from imaml_ext import ops
from imaml_ext.solvers.solution import Status


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_step_is_one_iteration(shape, diagonal, preconditioned, dtype, device):
    lam = torch.rand(shape[1], dtype=dtype, device=device) + 0.5 if diagonal else None
    (x, r, p, hp, lam), state = cg_arguments(*shape, dtype, device, lam, preconditioned)
    x1, r1, p1, h1, l1 = (t.double().clone() for t in (x, r, p, hp, lam))
    inverse = state["inverse"].double() if preconditioned else 1.0
    ap = h1 + (l1 + 0.25) * p1
    rz = (r1 * inverse * r1).sum(1, keepdim=True)
    alpha = rz / (p1 * ap).sum(1, keepdim=True)
    x1, r1 = x1 + alpha * p1, r1 - alpha * ap
    rz_new = (r1 * inverse * r1).sum(1, keepdim=True)
    p1 = inverse * r1 + rz_new / rz * p1

    ops.cg_step_(x, r, p, hp, lam, damping=0.25, **state)

    torch.testing.assert_close(x, x1.to(dtype), **tolerance(dtype))
    torch.testing.assert_close(r, r1.to(dtype), **tolerance(dtype))
    torch.testing.assert_close(p, p1.to(dtype), **tolerance(dtype))
    torch.testing.assert_close(state["curvature"], 1 / alpha[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(state["beta"], (rz_new / rz)[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["rr"], (r1 * r1).sum(1), rtol=1e-4, atol=1e-4)
    if preconditioned:
        torch.testing.assert_close(state["rz"], rz_new[:, 0], rtol=1e-4, atol=1e-4)
    assert (state["steps"] == 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_identity_as_preconditioner_gives_the_same_bits_as_no_preconditioner(
    shape, dtype, device
):
    torch.manual_seed(1)
    arguments, state = cg_arguments(*shape, dtype, device)
    torch.manual_seed(1)
    arguments1, state1 = cg_arguments(*shape, dtype, device)
    identity = {"inverse": torch.ones_like(arguments1[0]), "rz": state1["rr"].clone()}
    ops.cg_step_(*arguments, damping=0.25, **state)
    ops.cg_step_(*arguments1, damping=0.25, **state1, **identity)
    for plain, preconditioned in zip(arguments, arguments1, strict=True):
        assert torch.equal(plain, preconditioned)
    for name, plain in state.items():
        assert torch.equal(plain, state1[name]), name
    assert torch.equal(identity["rz"], state1["rr"])


def spd_system(device):
    """Two badly scaled systems, [2, 40, 40], with right-hand sides and inverse diagonals."""
    scale = torch.logspace(-2, 2, 40, dtype=torch.float64, device=device)
    factor = torch.randn(2, 40, 40, dtype=torch.float64, device=device)
    matrix = torch.eye(40, dtype=torch.float64, device=device) + factor @ factor.mT / 200
    matrix = scale[:, None] * matrix * scale
    b = torch.randn(2, 40, dtype=torch.float64, device=device)
    return matrix, b, 1 / matrix.diagonal(dim1=1, dim2=2).contiguous()


def preconditioned_solve(matrix, b, inverse, iterations, tol2):
    x, r, p = torch.zeros_like(b), b.clone(), inverse * b
    per_row = dict(dtype=torch.float64, device=b.device)
    state = {
        "rr": ops.row_dot(r, r),
        "rz": ops.row_dot(r, p),
        "tol2": torch.full((len(b),), tol2, **per_row),
        "status": torch.zeros(len(b), dtype=torch.int32, device=b.device),
        "steps": torch.zeros(len(b), dtype=torch.int32, device=b.device),
        "curvature": torch.empty(len(b), **per_row),
        "beta": torch.empty(len(b), **per_row),
    }
    for _ in range(iterations):
        hp = (matrix @ p[:, :, None])[:, :, 0]
        ops.cg_step_(x, r, p, hp, p.new_zeros(1), damping=0.0, inverse=inverse, **state)
    return x, r, state


def test_preconditioned_iterates_match_scipy(device):
    scipy_cg = pytest.importorskip("scipy.sparse.linalg").cg
    matrix, b, inverse = spd_system(device)
    for iterations in (1, 2, 7):
        x, _, _ = preconditioned_solve(matrix, b, inverse, iterations, tol2=0.0)
        for row in range(2):
            arrays = (t[row].cpu().numpy() for t in (matrix, b, inverse.diag_embed()))
            a, rhs, m = arrays
            want, _ = scipy_cg(a, rhs, M=m, maxiter=iterations, rtol=0.0, atol=0.0)
            torch.testing.assert_close(x[row].cpu(), torch.from_numpy(want), rtol=1e-9, atol=1e-9)


def test_a_preconditioned_row_stops_at_its_unpreconditioned_residual(device):
    matrix, b, inverse = spd_system(device)
    # The scale of M changes only r.z, which is then far below or above r.r.
    inverse *= torch.tensor([[1e-8], [1e8]], dtype=torch.float64, device=device)
    x, r, state = preconditioned_solve(matrix, b, inverse, 60, tol2=1e-12)
    assert (state["status"] == Status.CONVERGED).all()
    assert (state["steps"] < 60).all()
    residual = b - (matrix @ x[:, :, None])[:, :, 0]
    assert (residual.norm(dim=1) <= 1.01e-6).all()
    torch.testing.assert_close(state["rr"], r.square().sum(1))
    assert (state["rr"] > 1e-20).all()  # and not much later


def test_negative_curvature_in_the_first_step_takes_a_proximal_step(dtype, device):
    (x, r, p, _, lam), state = cg_arguments(3, 17, dtype, device, preconditioned=True)
    p.copy_(state["inverse"] * r)
    want = x + r / lam
    ops.cg_step_(x, r, p, -9 * p, lam, damping=0.0, **state)
    assert (state["status"] == Status.NEGATIVE_CURVATURE).all()
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rz": None}, "a preconditioner needs both inverse and rz, got inverse alone"),
        ({"inverse": None}, "a preconditioner needs both inverse and rz, got rz alone"),
        ({"inverse": torch.ones(4)}, r"inverse must be \[3, 4\], got \[4\]"),
        ({"inverse": torch.ones(3, 4)}, "inverse must have the dtype of x, Double, got Float"),
        ({"inverse": torch.ones(4, 3).double().T}, "inverse must be contiguous"),
        ({"rz": torch.ones(3)}, "rz must be Double, got Float"),
        ({"rz": torch.ones(4).double()}, r"rz must be \[3\], got \[4\]"),
        ({"tol2": torch.ones(3)}, "tol2 must be Double, got Float"),
    ],
)
def test_an_invalid_preconditioner_is_refused_by_name(change, message):
    arguments, state = cg_arguments(3, 4, torch.float64, "cpu", preconditioned=True)
    with pytest.raises(RuntimeError, match=f"cg_step_: {message}"):
        ops.cg_step_(*arguments, damping=0.0, **(state | change))
