"""The operators: values, checks, and how they behave as torch operators.

Sizes straddle the kernels' boundaries more densely in csrc/tests; here it is what Python adds.
"""

import functools
import shutil
import subprocess
import sys

import pytest
import torch
from operator_calls import OPERATORS

import imaml_ext
from imaml_ext import ops
from imaml_ext.ops import extension
from imaml_ext.solvers.solution import Status

SHAPES = [(1, 1), (3, 17), (5, 4096), (2, 4097), (16, 1761), (70, 3), (0, 5)]

ADAM = {
    "first_moment": torch.zeros(3, 4),
    "second_moment": torch.zeros(3, 4),
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "step": 1,
}


def tolerance(dtype):
    return (
        {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    )


def cg_arguments(rows, dim, dtype, device, lam=None, preconditioned=False):
    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    x, r, p = normal(rows, dim), normal(rows, dim), normal(rows, dim)
    hp = 2 * p
    lam = torch.full((1,), 0.5, dtype=dtype, device=device) if lam is None else lam
    per_row = {"dtype": torch.float64, "device": device}
    integers = {"dtype": torch.int32, "device": device}
    state = {
        "rr": (r.double() ** 2).sum(1),
        "tol2": torch.zeros(rows, **per_row),
        "status": torch.zeros(rows, **integers),
        "steps": torch.zeros(rows, **integers),
        "curvature": torch.full((rows,), -7.0, **per_row),
        "beta": torch.full((rows,), -7.0, **per_row),
    }
    if preconditioned:
        state["inverse"] = torch.rand_like(r) + 0.5
        state["rz"] = (r.double() ** 2 * state["inverse"]).sum(1)
    return (x, r, p, hp, lam), state


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
def test_the_identity_is_no_preconditioner_to_the_bit(shape, dtype, device):
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


def test_preconditioned_iterates_are_scipys(device):
    scipy_cg = pytest.importorskip("scipy.sparse.linalg").linear
    matrix, b, inverse = spd_system(device)
    for iterations in (1, 2, 7):
        x, _, _ = preconditioned_solve(matrix, b, inverse, iterations, tol2=0.0)
        for row in range(2):
            arrays = (t[row].cpu().numpy() for t in (matrix, b, inverse.diag_embed()))
            a, rhs, m = arrays
            want, _ = scipy_cg(a, rhs, M=m, maxiter=iterations, rtol=0.0, atol=0.0)
            torch.testing.assert_close(x[row].cpu(), torch.from_numpy(want), rtol=1e-9, atol=1e-9)


def test_a_preconditioned_row_stops_at_its_own_residual(device):
    matrix, b, inverse = spd_system(device)
    # The scale of M changes nothing but r.z, which is then far from r.r, below or above.
    inverse *= torch.tensor([[1e-8], [1e8]], dtype=torch.float64, device=device)
    x, r, state = preconditioned_solve(matrix, b, inverse, 60, tol2=1e-12)
    assert (state["status"] == Status.CONVERGED).all()
    assert (state["steps"] < 60).all()
    residual = b - (matrix @ x[:, :, None])[:, :, 0]
    assert (residual.norm(dim=1) <= 1.01e-6).all()
    torch.testing.assert_close(state["rr"], r.square().sum(1))
    assert (state["rr"] > 1e-20).all()  # and not far beyond


def test_negative_curvature_at_once_leaves_h_out_of_a_preconditioned_system_too(dtype, device):
    (x, r, p, _, lam), state = cg_arguments(3, 17, dtype, device, preconditioned=True)
    p.copy_(state["inverse"] * r)
    want = x + r / lam
    ops.cg_step_(x, r, p, -9 * p, lam, damping=0.0, **state)
    assert (state["status"] == Status.NEGATIVE_CURVATURE).all()
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_prox_gd_is_sgd_on_the_proximal_objective(shape, nesterov, dtype, device):
    def normal(*size):
        return torch.randn(size, dtype=dtype, device=device)

    phi, theta, lam = normal(*shape), normal(shape[1]), normal(shape[1]).abs()
    leaf = phi.clone().requires_grad_()
    sgd = torch.optim.SGD([leaf], lr=0.1, momentum=0.9, nesterov=nesterov)
    velocity = torch.zeros_like(phi)
    for _ in range(3):
        grad = normal(*shape)
        leaf.grad = grad + lam * (leaf.detach() - theta)
        sgd.step()
        ops.prox_gd_(
            phi, grad, theta, lam, lr=0.1, velocity=velocity, momentum=0.9, nesterov=nesterov
        )
    torch.testing.assert_close(phi, leaf.detach(), **tolerance(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_prox_adam_is_adam_on_the_proximal_objective(shape, diagonal, dtype, device):
    def normal(*size):
        return torch.randn(size, dtype=dtype, device=device)

    phi, theta, lam = normal(*shape), normal(shape[1]), normal(shape[1] if diagonal else 1).abs()
    leaf = phi.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.03, betas=(0.8, 0.95), eps=1e-3)
    m, v = torch.zeros_like(phi), torch.zeros_like(phi)
    for step in range(1, 5):
        grad = normal(*shape)
        leaf.grad = grad + lam * (leaf.detach() - theta)
        adam.step()
        ops.prox_adam_(
            phi, grad, theta, lam, lr=0.03, first_moment=m, second_moment=v, beta1=0.8, beta2=0.95,
            eps=1e-3, step=step,
        )  # fmt: skip
        state = adam.state[leaf]
        torch.testing.assert_close(phi, leaf.detach(), **tolerance(dtype))
        torch.testing.assert_close(m, state["exp_avg"], **tolerance(dtype))
        torch.testing.assert_close(v, state["exp_avg_sq"], **tolerance(dtype))


def test_adams_bias_corrections_do_not_round_in_float32():
    # In float32, 1 - 0.9999999 is 1.2e-7 and not 1e-7.
    phi, m, v = (torch.zeros(1, 4) for _ in range(3))
    grad, zero = torch.ones(1, 4), torch.zeros(4)
    ops.prox_adam_(
        phi, grad, zero, zero, lr=1.0, first_moment=m, second_moment=v, beta1=0.9999999,
        beta2=0.9999999, eps=0.0, step=1,
    )  # fmt: skip
    torch.testing.assert_close(phi, -grad)
    torch.testing.assert_close(m, 1e-7 * grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_row_sums(shape, dtype, device):
    phi, grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    theta, lam = (torch.randn(shape[1], dtype=dtype, device=device) for _ in range(2))
    p, g, t, w = (x.double() for x in (phi, grad, theta, lam))
    norm2, penalty = ops.prox_norms(phi, grad, theta, lam)
    torch.testing.assert_close(norm2, ((g + w * (p - t)) ** 2).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalty, (w * (p - t) ** 2).sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ops.row_dot(phi, grad), (p * g).sum(1), rtol=1e-12, atol=1e-10)


def test_a_row_that_is_not_running_is_left_alone(dtype, device):
    phi = torch.randn(3, 9, dtype=dtype, device=device)
    before = phi.clone()
    status = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    zero = torch.zeros(9, dtype=dtype, device=device)
    ops.prox_gd_(phi, torch.ones_like(phi), zero, zero, lr=0.1, status=status)
    assert torch.equal(phi[1:], before[1:])
    torch.testing.assert_close(phi[0], before[0] - 0.1)

    m, v = torch.zeros_like(phi), torch.zeros_like(phi)
    ops.prox_adam_(
        phi, torch.ones_like(phi), zero, zero, lr=0.1, first_moment=m, second_moment=v, beta1=0.9,
        beta2=0.999, eps=0.0, step=1, status=status,
    )  # fmt: skip
    assert torch.equal(phi[1:], before[1:])
    assert not m[1:].any()
    assert not v[1:].any()
    torch.testing.assert_close(phi[0], before[0] - 0.2)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(rows, preconditioned, dtype):
    def run():
        torch.manual_seed(1)
        (x, r, p, hp, lam), state = cg_arguments(rows, 30011, dtype, "cpu", None, preconditioned)
        ops.cg_step_(x, r, p, hp, lam, damping=0.1, **state)
        theta = torch.randn(30011, dtype=dtype)
        sums = ops.prox_norms(x, r, theta, lam)
        ops.prox_adam_(
            x, r, theta, lam, lr=0.1, first_moment=p, second_moment=hp.square_(), beta1=0.9,
            beta2=0.99, eps=1e-8, step=2,
        )  # fmt: skip
        return [x, r, p, hp, *state.values(), *sums, ops.row_dot(x, r)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(4)
        many = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def samples(dtype, device):
    for preconditioned in (False, True):
        arguments, state = cg_arguments(3, 5, dtype, device, None, preconditioned)
        order = ("inverse", "rr", "rz", "tol2", "status", "steps", "curvature", "beta")
        yield (
            torch.ops.imaml.cg_step_.default,
            (*arguments, 0.1, *(state.get(name) for name in order)),
        )
    phi, velocity, grad = (torch.randn(3, 5, dtype=dtype, device=device) for _ in range(3))
    theta, lam = torch.randn(5, dtype=dtype, device=device), arguments[-1]
    yield torch.ops.imaml.prox_gd_.default, (phi, velocity, grad, theta, lam, 0.1, 0.9, True, None)
    yield torch.ops.imaml.prox_gd_.default, (phi, None, grad, theta, lam, 0.1, 0.0, False, None)
    yield (
        torch.ops.imaml.prox_adam_.default,
        (phi, velocity, velocity.square(), grad, theta, lam, 0.1, 0.9, 0.999, 1e-8, 3, None),
    )
    yield torch.ops.imaml.prox_norms.default, (phi, grad, theta, lam)
    yield torch.ops.imaml.row_dot.default, (phi, grad)


def test_opcheck(dtype, device):
    for operator, arguments in samples(dtype, device):
        torch.library.opcheck(operator, arguments)


def test_operators_compile_without_a_graph_break(device):
    def solve_step(x, r, p, hp, lam, state, theta):
        ops.cg_step_(x, r, p, hp * 1.5, lam, damping=0.1, **state)
        ops.prox_gd_(r, p, theta, lam, lr=0.1)
        ops.prox_adam_(
            r, p, theta, lam, lr=0.1, first_moment=x, second_moment=hp.square(), beta1=0.9,
            beta2=0.999, eps=1e-8, step=1,
        )  # fmt: skip
        return ops.row_dot(x, r).sin() + ops.prox_norms(x, r, theta, lam)[0]

    torch._dynamo.reset()
    compiled = torch.compile(solve_step, fullgraph=True, backend="aot_eager")
    for rows, dim in ((3, 8), (5, 9)):
        arguments, state = cg_arguments(rows, dim, torch.float64, device)
        theta = torch.randn(dim, dtype=torch.float64, device=device)
        eager = [t.clone() for t in arguments], {k: v.clone() for k, v in state.items()}
        torch.testing.assert_close(
            compiled(*arguments, state, theta), solve_step(*eager[0], eager[1], theta)
        )
        torch.testing.assert_close(arguments[2], eager[0][2])


def test_autograd_notices_that_a_saved_tensor_was_overwritten():
    weight = torch.randn(3, 4, requires_grad=True)
    phi, grad, theta, lam = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4), torch.ones(1)
    loss = (weight * phi).sum()
    ops.prox_gd_(phi, grad, theta, lam, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_written_has_a_new_version():
    def bumps(tensors, call):
        before = [t._version for t in tensors]
        call()
        return [t._version - version for t, version in zip(tensors, before, strict=True)]

    (x, r, p, hp, lam), state = cg_arguments(3, 4, torch.float32, "cpu", preconditioned=True)
    read = [hp, lam, state["tol2"], state["inverse"]]
    written = [x, r, p, *(t for t in state.values() if all(t is not other for other in read))]
    assert len(written) == 9
    step = functools.partial(ops.cg_step_, x, r, p, hp, lam, damping=0.0, **state)
    assert bumps(written, step) == [1] * 9
    assert bumps(read, step) == [0] * 4

    adam = ADAM | {"first_moment": r, "second_moment": torch.zeros(3, 4)}
    theta = torch.zeros(4)
    step = functools.partial(ops.prox_adam_, x, hp, theta, lam, lr=0.1, **adam)
    assert bumps([x, r, adam["second_moment"]], step) == [1] * 3
    assert bumps([hp, theta, lam], step) == [0] * 3


def test_tensors_that_require_grad_are_refused():
    phi = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="row_dot: not differentiable"):
        ops.row_dot(phi, phi)
    with torch.no_grad():
        ops.row_dot(phi, phi)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rz": None}, "a preconditioner needs both inverse and rz, got inverse alone"),
        ({"inverse": None}, "a preconditioner needs both inverse and rz, got rz alone"),
        ({"inverse": torch.ones(4)}, r"inverse must have x's shape \[3, 4\], got \[4\]"),
        ({"inverse": torch.ones(3, 4)}, "inverse must be Double as x, got Float"),
        ({"inverse": torch.ones(4, 3).double().T}, "inverse must be contiguous"),
        ({"rz": torch.ones(3)}, "rz must be Double, got Float"),
        ({"rz": torch.ones(4).double()}, r"rz must be \[3\], got \[4\]"),
        ({"tol2": torch.ones(3)}, "tol2 must be Double, got Float"),
    ],
)
def test_a_preconditioner_that_does_not_fit_is_refused_by_name(change, message):
    arguments, state = cg_arguments(3, 4, torch.float64, "cpu", preconditioned=True)
    with pytest.raises(RuntimeError, match=f"cg_step_: {message}"):
        ops.cg_step_(*arguments, damping=0.0, **(state | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": torch.zeros(3)}, r"phi must be \[B, D\], got \[3\]"),
        ({"phi": torch.zeros(3, 4, dtype=torch.int64)}, "phi must be float32 or float64"),
        ({"phi": torch.zeros(4, 3).T}, "phi must be contiguous"),
        ({"grad": torch.zeros(3, 5)}, r"grad must have phi's shape \[3, 4\], got \[3, 5\]"),
        ({"grad": torch.zeros(3, 4, dtype=torch.float64)}, "grad must be Float as phi, got Double"),
        ({"theta": torch.zeros(3)}, r"theta must be \[4\], got \[3\]"),
        ({"theta": torch.zeros(8)[::2]}, "theta must be contiguous"),
        ({"lam": torch.zeros(2)}, r"lam must be \[1\] or \[4\], got \[2\]"),
        ({"status": torch.zeros(3)}, "status must be Int, got Float"),
        ({"status": torch.zeros(2, dtype=torch.int32)}, r"status must be \[3\], got \[2\]"),
    ],
)
@pytest.mark.parametrize("rule", [{}, ADAM], ids=["prox_gd_", "prox_adam_"])
def test_what_does_not_fit_is_refused_by_name(change, message, rule):
    arguments = {
        "phi": torch.zeros(3, 4),
        "grad": torch.zeros(3, 4),
        "theta": torch.zeros(4),
        "lam": torch.ones(1),
    } | change
    operator = ops.prox_adam_ if rule else ops.prox_gd_
    with pytest.raises(RuntimeError, match=f"{operator.__name__}: {message}"):
        operator(**arguments, **rule, lr=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_moment": torch.zeros(3)}, r"first_moment must have phi's shape \[3, 4\]"),
        ({"second_moment": torch.zeros(3, 4).double()}, "second_moment must be Float as phi"),
        ({"second_moment": torch.zeros(4, 3).T}, "second_moment must be contiguous"),
        ({"beta1": -0.1}, r"beta1 and beta2 must be in \[0, 1\), got -0.1"),
        ({"beta2": 1.0}, r"beta1 and beta2 must be in \[0, 1\), got 1"),
        ({"step": 0}, "step counts from 1, got 0"),
    ],
)
def test_moments_that_do_not_fit_are_refused_by_name(change, message):
    arguments = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4), torch.ones(1)
    with pytest.raises(RuntimeError, match=f"prox_adam_: {message}"):
        ops.prox_adam_(*arguments, lr=0.1, **(ADAM | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.9}, "momentum needs a velocity buffer"),
        ({"velocity": torch.zeros(3, 5)}, r"velocity must have phi's shape \[3, 4\]"),
    ],
)
def test_a_velocity_that_does_not_fit_is_refused_by_name(change, message):
    arguments = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4), torch.ones(1)
    with pytest.raises(RuntimeError, match=f"prox_gd_: {message}"):
        ops.prox_gd_(*arguments, lr=0.1, **change)


@pytest.mark.skipif(bool(ops.build_info()["cuda"]), reason="built with CUDA kernels")
def test_every_operator_of_a_cpu_build_names_the_remedy_when_it_meets_a_cuda_tensor():
    # There may be no GPU, so the dispatcher is told to take its kernel for CUDA.
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    values = {"Tensor": torch.ones(1), "float": 1.0, "int": 1, "SymInt": 1, "bool": False}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("imaml::")]
    assert {name.partition("::")[2] for name in names} >= set(OPERATORS)
    for name in names:
        operator = getattr(torch.ops.imaml, name.partition("::")[2]).default
        arguments = [values.get(str(a.type)) for a in operator._schema.arguments]
        remedy = (
            f"^{operator._opname}: .* without CUDA kernels: reinstall it with `pip install [^\n]*$"
        )
        with pytest.raises(RuntimeError, match=remedy) as caught:
            operator.redispatch(cuda, *arguments)
        assert type(caught.value) is RuntimeError


def test_status_has_the_kernels_numbers():
    from pathlib import Path

    header = Path(__file__).parents[2] / "csrc" / "kernels" / "formulas.h"
    if not header.is_file():
        pytest.skip("the sources are not here")
    text = header.read_text()
    for status in Status:
        name = "k" + "".join(word.capitalize() for word in status.name.split("_"))
        assert f"{name} = {status.value}," in text


def test_build_info_names_the_version():
    assert imaml_ext.build_info()["version"] == imaml_ext.__version__


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("raise ImportError('undefined symbol: x')", "pip install ."),
        ("def build_info(): return {'version': '0.0.0'}", "pip install --force-reinstall"),
    ],
)
def test_a_missing_or_stale_extension_names_the_remedy(stub, message, tmp_path):
    package = tmp_path / "imaml_ext"
    shutil.copytree(imaml_ext.__path__[0] + "/ops", package / "ops")
    shutil.copy2(imaml_ext.__path__[0] + "/_version.py", package)
    (package / "__init__.py").write_text("")
    (package / "_C.py").write_text(stub)
    result = subprocess.run(
        [sys.executable, "-c", "import imaml_ext.ops"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "ImportError: imaml_ext: " in result.stderr
    assert message in result.stderr


@pytest.mark.skipif(not hasattr(extension.extension, "cg_occupancy"), reason="built without CUDA")
def test_how_a_row_is_worked_on_can_be_asked():
    blocks, at_a_time = ops.cluster_occupancy(113221, torch.float32, 16)
    assert list(at_a_time) == [1, 2, 4, 8, 16]
    if torch.cuda.is_available():
        assert blocks == 0 or at_a_time[blocks] > 0
    else:
        assert (blocks, sum(at_a_time.values())) == (0, 0)
