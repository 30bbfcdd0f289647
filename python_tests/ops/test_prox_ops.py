"""The proximal steps and the row sums: values and refusals. csrc/tests covers more sizes."""

import pytest
import torch
from row_operands import ADAM, SHAPES, tolerance

from imaml_ext import ops


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
def test_prox_norms_and_row_dot_are_sums_over_each_row(shape, dtype, device):
    phi, grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    theta, lam = (torch.randn(shape[1], dtype=dtype, device=device) for _ in range(2))
    p, g, t, w = (x.double() for x in (phi, grad, theta, lam))
    norm2, penalty = ops.prox_norms(phi, grad, theta, lam)
    torch.testing.assert_close(norm2, ((g + w * (p - t)) ** 2).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalty, (w * (p - t) ** 2).sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ops.row_dot(phi, grad), (p * g).sum(1), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_pull_back_sums_over_the_rows_that_count(shape, dtype, device):
    x, phi = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    theta = torch.randn(shape[1], dtype=dtype, device=device)
    weight = torch.tensor([0.3], dtype=dtype, device=device)
    use = torch.arange(shape[0], dtype=torch.int32, device=device) % 3
    x[use == 0], phi[use < 2] = torch.nan, torch.inf  # these must not count
    got = ops.pull_back(x, phi, theta, weight, use)
    w, d = 0.3 * x[use > 0].double(), (phi - theta)[use == 2].double()
    want = w.sum(0), (0.3 * x[use == 2].double() * d).sum(0)
    for sums, expected in zip(got, want, strict=True):
        torch.testing.assert_close(sums, expected.to(dtype), rtol=1e-5, atol=1e-5)
    if shape[0] > 0:
        nan = ops.pull_back(x, phi, theta, torch.nan * weight, use)
        assert all(sums.isnan().all() for sums in nan)


def test_a_row_that_is_not_running_is_not_updated(dtype, device):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": torch.zeros(3)}, r"phi must have 2 dimensions, got \[3\]"),
        ({"phi": torch.zeros(3, 4, dtype=torch.int64)}, "phi must be float32 or float64"),
        ({"phi": torch.zeros(4, 3).T}, "phi must be contiguous"),
        ({"grad": torch.zeros(3, 5)}, r"grad must be \[3, 4\], got \[3, 5\]"),
        (
            {"grad": torch.zeros(3, 4, dtype=torch.float64)},
            "grad must have the dtype of phi, Float",
        ),
        ({"theta": torch.zeros(3)}, r"theta must be \[4\], got \[3\]"),
        ({"theta": torch.zeros(8)[::2]}, "theta must be contiguous"),
        ({"lam": torch.zeros(2)}, r"lam must be \[1\] or \[4\], got \[2\]"),
        ({"status": torch.zeros(3)}, "status must be Int, got Float"),
        ({"status": torch.zeros(2, dtype=torch.int32)}, r"status must be \[3\], got \[2\]"),
    ],
)
@pytest.mark.parametrize("rule", [{}, ADAM], ids=["prox_gd_", "prox_adam_"])
def test_an_invalid_operand_is_refused_by_name(change, message, rule):
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
        ({"first_moment": torch.zeros(3)}, r"first_moment must be \[3, 4\]"),
        (
            {"second_moment": torch.zeros(3, 4).double()},
            "second_moment must have the dtype of phi",
        ),
        ({"second_moment": torch.zeros(4, 3).T}, "second_moment must be contiguous"),
        ({"beta1": -0.1}, r"beta1 and beta2 must be in \[0, 1\), got -0.1"),
        ({"beta2": 1.0}, r"beta1 and beta2 must be in \[0, 1\), got 1"),
        ({"step": 0}, "step must be at least 1, got 0"),
    ],
)
def test_invalid_moments_are_refused_by_name(change, message):
    arguments = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4), torch.ones(1)
    with pytest.raises(RuntimeError, match=f"prox_adam_: {message}"):
        ops.prox_adam_(*arguments, lr=0.1, **(ADAM | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.9}, "momentum needs a velocity buffer"),
        ({"velocity": torch.zeros(3, 5)}, r"velocity must be \[3, 4\]"),
    ],
)
def test_an_invalid_velocity_is_refused_by_name(change, message):
    arguments = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4), torch.ones(1)
    with pytest.raises(RuntimeError, match=f"prox_gd_: {message}"):
        ops.prox_gd_(*arguments, lr=0.1, **change)
