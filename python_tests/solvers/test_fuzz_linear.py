"""Linear solvers on random systems: the solution of a dense solve, a status, or an error."""

import pytest
import torch
from fuzz import sampled, seeds, tried
from fuzz_problems import assert_near, assert_rejected, reported_tasks
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imaml_ext import MINRES, ConjugateGradient, NeumannSeries, Status, conjugate_gradient

pytestmark = pytest.mark.fuzz


@st.composite
def systems(draw):
    """Symmetric matrices with eigenvalues in [1, 10], right-hand sides, and Λ in every form."""
    rows, dim = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    dtype = draw(sampled(torch.float32, torch.float64))
    generator = torch.Generator().manual_seed(draw(seeds))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, _ = torch.linalg.qr(normal(rows, dim, dim))
    eigenvalues = 1 + 9 * torch.rand(rows, dim, generator=generator, dtype=torch.float64)
    h = q @ torch.diag_embed(eigenvalues) @ q.mT
    lam = {
        "none": 0.0,
        "float": draw(st.floats(0, 3)),  # includes values that round to 0 in float32
        "0-d": normal().abs().to(dtype),
        "[1]": normal(1).abs().to(dtype),
        "diagonal": normal(dim).abs().to(dtype),
        "dense": torch.eye(dim, dtype=dtype),
    }[draw(sampled("none", "float", "0-d", "[1]", "diagonal", "dense"))]
    b = normal(rows, dim).to(dtype)
    strided = draw(st.booleans())
    return h, torch.stack([b, b], 2)[..., 0] if strided else b, lam


def dense(h, lam, damping):
    lam = torch.as_tensor(lam, dtype=torch.float64)
    eye = torch.eye(h.shape[-1], dtype=torch.float64)
    return h + (lam if lam.dim() == 2 else lam * eye) + damping * eye


@given(systems(), sampled(0.0, 0.5), st.data())
def test_the_solution_agrees_with_a_dense_solve(system, damping, data):
    h, b, lam = system
    dim = b.shape[1]

    def matvec(p):
        return (h.to(b.dtype) @ p[..., None])[..., 0]

    settings = {"max_iter": dim + 3, "damping": damping}
    kind = data.draw(sampled("conjugate_gradient", "MINRES", "NeumannSeries"))
    if kind == "conjugate_gradient":
        start = data.draw(sampled(None, torch.ones_like(b)))
        scales = data.draw(sampled(None, torch.full((dim,), 2.0, dtype=b.dtype)))
        got = conjugate_gradient(matvec, b, lam=lam, x0=start, preconditioner=scales, **settings)
    elif kind == "MINRES":
        got = MINRES(**settings).solve(matvec, b, lam)
    else:
        solver = NeumannSeries(max_iter=600, damping=damping, lr=0.05)
        got = solver.solve(matvec, b, lam)
    tried[kind] += 1
    expected = torch.linalg.solve(dense(h, lam, damping), b.double()[..., None])[..., 0]
    assert_near(got.value, expected, b.dtype)
    assert got.status.dtype == torch.int32
    assert got.status.shape == got.steps.shape == got.residual.shape == (len(b),)
    ended = (got.status == Status.CONVERGED) | (got.status == Status.MAX_ITER)
    assert ended.all()


@given(systems(), st.data())
def test_a_nonfinite_or_concave_row_does_not_change_the_others(system, data):
    h, b, lam = system
    assume(b.numel() > 0)
    row = data.draw(st.integers(0, len(b) - 1))
    how = data.draw(sampled("b", "product", "concave", "huge"))
    solver = data.draw(
        sampled(ConjugateGradient(max_iter=4), MINRES(max_iter=4), NeumannSeries(max_iter=4))
    )
    worse, sign = b.clone(), torch.ones(len(b), 1, dtype=b.dtype)
    if how == "b":
        column = data.draw(st.integers(0, b.shape[1] - 1))
        worse[row, column] = data.draw(sampled(torch.nan, torch.inf, -torch.inf))
    sign[row] = {"product": torch.nan, "concave": -30.0, "huge": 1e38}.get(how, 1.0)

    def matvec(p):
        return sign_now * (h.to(b.dtype) @ p[..., None])[..., 0]

    sign_now = torch.ones_like(sign)
    good = solver.solve(matvec, b, lam)
    sign_now = sign
    got = solver.solve(matvec, worse, lam)
    tried[type(solver).__name__] += 2
    others = [i for i in range(len(b)) if i != row]
    for name in ("value", "status", "steps", "residual"):
        assert torch.equal(getattr(got, name)[others], getattr(good, name)[others])
    assert got.value.isfinite().all()
    if how in ("b", "product"):
        assert got.status[row] == Status.NONFINITE
        assert not got.value[row].any()
        assert got.residual[row].isnan()
        assert reported_tasks(got.describe()) == {row}
    elif how == "concave" and not isinstance(solver, MINRES):
        # In the first iteration the value is Λ^-1 b, which overflows for a tiny lam.
        overflows = isinstance(lam, float) and 0 < lam < 1e-30 and got.steps[row] == 0
        allowed = {Status.NEGATIVE_CURVATURE} | ({Status.NONFINITE} if overflows else set())
        assert got.status[row].item() in allowed


SYSTEMS = {
    "matvec": [lambda p: None, lambda p: p[:1], lambda p: p[:, :1], lambda p: p.half(),
               lambda p: p[0], lambda p: p.to("meta")],
    "b": [torch.ones(4), torch.ones(3, 4).half(), torch.ones(3, 4, dtype=torch.int64), [1.0], None,
          torch.ones(()).expand(2**30, 2**30, 2)],
    "lam": [torch.nan, torch.inf, 1e300, None, "1", torch.ones(2), torch.ones(4).double(),
            torch.ones(4, device="meta"), torch.ones(3, 5), torch.ones(2, 4)],
    "x0": [torch.ones(4), torch.ones(3, 4).double(), torch.ones(3, 4, device="meta")],
    "preconditioner": [torch.zeros(4), -torch.ones(3, 4), torch.ones(3), torch.ones(4).half(),
                       torch.full((4,), torch.nan), torch.ones(4, device="meta")],
    "damping": [-1.0, torch.nan, torch.inf, 1e300, None],
    "max_iter": [0, -1, 1.5, None],
    "rtol": [-1.0, torch.nan, "1"], "atol": [-1.0, torch.nan],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "which"), [(n, k) for n, values in SYSTEMS.items() for k in range(len(values))]
)
@given(solver=sampled("cg", MINRES, NeumannSeries))
@example("cg")
@example(MINRES)
def test_invalid_arguments_are_rejected(name, which, solver):
    wrong = {name: SYSTEMS[name][which]}
    arguments = {"matvec": lambda p: 2 * p, "b": torch.ones(3, 4), "max_iter": 2, "lam": 1.0}
    arguments |= wrong
    if solver == "cg":
        assert_rejected(lambda: conjugate_gradient(**arguments))
    else:
        assume(name != "preconditioner")
        settings = {
            n: arguments.pop(n) for n in ("damping", "max_iter", "rtol", "atol") if n in arguments
        }
        assert_rejected(lambda: solver(**settings).solve(**arguments))
    tried[solver if solver == "cg" else solver.__name__] += 1
