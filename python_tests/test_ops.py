"""The operators: values, checks, and how they behave as torch operators.

Sizes straddle the kernels' boundaries more densely in csrc/tests; here it is what Python adds.
"""

import subprocess
import sys

import pytest
import torch

import imaml_ext
from imaml_ext import ops
from imaml_ext.solution import Status

SHAPES = [(1, 1), (3, 17), (5, 4096), (2, 4097), (16, 1761), (70, 3), (0, 5)]


def tolerance(dtype):
    return (
        {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    )


def cg_arguments(rows, dim, dtype, device, lam=None):
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
    return (x, r, p, hp, lam), state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_cg_step_is_one_iteration(shape, diagonal, dtype, device):
    lam = torch.rand(shape[1], dtype=dtype, device=device) + 0.5 if diagonal else None
    (x, r, p, hp, lam), state = cg_arguments(*shape, dtype, device, lam)
    x1, r1, p1, h1, l1 = (t.double().clone() for t in (x, r, p, hp, lam))
    ap = h1 + (l1 + 0.25) * p1
    rr = (r1 * r1).sum(1, keepdim=True)
    alpha = rr / (p1 * ap).sum(1, keepdim=True)
    x1, r1 = x1 + alpha * p1, r1 - alpha * ap
    beta = (r1 * r1).sum(1, keepdim=True) / rr

    ops.cg_step_(x, r, p, hp, lam, damping=0.25, **state)

    torch.testing.assert_close(x, x1.to(dtype), **tolerance(dtype))
    torch.testing.assert_close(r, r1.to(dtype), **tolerance(dtype))
    torch.testing.assert_close(p, (r1 + beta * p1).to(dtype), **tolerance(dtype))
    torch.testing.assert_close(state["curvature"], 1 / alpha[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(state["rr"], (r1 * r1).sum(1), rtol=1e-4, atol=1e-4)
    assert (state["steps"] == 1).all()


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


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_bits_do_not_depend_on_the_number_of_threads(rows, dtype):
    def run():
        torch.manual_seed(1)
        (x, r, p, hp, lam), state = cg_arguments(rows, 30011, dtype, "cpu")
        ops.cg_step_(x, r, p, hp, lam, damping=0.1, **state)
        theta = torch.randn(30011, dtype=dtype)
        sums = ops.prox_norms(x, r, theta, lam)
        return [x, r, p, *state.values(), *sums, ops.row_dot(x, r)]

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
    arguments, state = cg_arguments(3, 5, dtype, device)
    yield (
        torch.ops.imaml.cg_step_.default,
        (*arguments, 0.1, *state.values()),
    )
    phi, velocity, grad = (torch.randn(3, 5, dtype=dtype, device=device) for _ in range(3))
    theta, lam = torch.randn(5, dtype=dtype, device=device), arguments[-1]
    yield torch.ops.imaml.prox_gd_.default, (phi, velocity, grad, theta, lam, 0.1, 0.9, True, None)
    yield torch.ops.imaml.prox_gd_.default, (phi, None, grad, theta, lam, 0.1, 0.0, False, None)
    yield torch.ops.imaml.prox_norms.default, (phi, grad, theta, lam)
    yield torch.ops.imaml.row_dot.default, (phi, grad)


def test_opcheck(dtype, device):
    for operator, arguments in samples(dtype, device):
        torch.library.opcheck(operator, arguments)


def test_operators_compile_without_a_graph_break(device):
    def solve_step(x, r, p, hp, lam, state, theta):
        ops.cg_step_(x, r, p, hp * 1.5, lam, damping=0.1, **state)
        ops.prox_gd_(r, p, theta, lam, lr=0.1)
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


def test_tensors_that_require_grad_are_refused():
    phi = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="row_dot: not differentiable"):
        ops.row_dot(phi, phi)
    with torch.no_grad():
        ops.row_dot(phi, phi)


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
        ({"momentum": 0.9}, "momentum needs a velocity buffer"),
        ({"status": torch.zeros(3)}, "status must be Int, got Float"),
        ({"status": torch.zeros(2, dtype=torch.int32)}, r"status must be \[3\], got \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = {
        "phi": torch.zeros(3, 4),
        "grad": torch.zeros(3, 4),
        "theta": torch.zeros(4),
        "lam": torch.ones(1),
    } | change
    with pytest.raises(RuntimeError, match=f"prox_gd_: {message}"):
        ops.prox_gd_(**arguments, lr=0.1)


def test_status_has_the_kernels_numbers():
    from pathlib import Path

    header = Path(__file__).parents[1] / "csrc" / "kernels" / "formulas.h"
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
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_C.py").write_text(stub)
    for name in ("ops.py", "_version.py"):
        source = imaml_ext.__path__[0] + "/" + name
        with open(source) as file:
            (package / name).write_text(file.read())
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
