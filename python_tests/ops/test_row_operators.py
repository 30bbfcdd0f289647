"""The operators on rows as torch operators: autograd, compilation, threads."""

import functools

import pytest
import torch
from row_operands import ADAM, cg_arguments

from imaml_ext import ops


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
    use, weight = torch.tensor([0, 1, 2], dtype=torch.int32, device=device), arguments[-1][:1]
    yield torch.ops.imaml.pull_back.default, (phi, grad, theta, weight, use)


def test_every_operator_passes_opcheck(dtype, device):
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


def test_autograd_detects_that_a_saved_tensor_was_overwritten():
    weight = torch.randn(3, 4, requires_grad=True)
    phi, grad, theta, lam = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4), torch.ones(1)
    loss = (weight * phi).sum()
    ops.prox_gd_(phi, grad, theta, lam, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_written_tensors_get_a_new_version_and_others_do_not():
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
