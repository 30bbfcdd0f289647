"""Gradients that operators write to rows, against `torch.func` on one task at a time."""

import pytest
import torch
import torch.nn.functional as F

from imaml_ext.ops.row_slices import WritingRows, destination
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective

B = 3
SHAPES = {"w": (4, 4, 3, 3), "bias": (4,), "unused": (5,), "v": (2, 4, 1, 1), "scale": ()}
X = torch.randn(B, 2, 4, 6, 6, dtype=torch.float64)


def conv(x, w):
    return F.conv2d(x, w, padding=w.shape[-1] // 2)


def once(p, x):
    return conv(conv(x, p["w"]).tanh(), p["v"]).square().mean() * p["scale"]


def tied(p, x):
    return conv(conv(conv(x, p["w"]).tanh(), p["w"]).tanh(), p["w"]).square().mean()


def part_of_a_weight(p, x):
    return conv(conv(x, p["w"][:2]).tanh(), p["w"][:, :2]).square().mean()


def penalised_between(p, x):
    y = conv(x, p["w"]).tanh()
    y = y + (p["w"] ** 3).sum() + conv(y, 2 * p["w"])
    return conv(y, p["w"]).sin().mean() + p["w"].norm()


LOSSES = [once, tied, part_of_a_weight, penalised_between]


def make(loss):
    layout = Layout({k: torch.zeros(s, dtype=torch.float64) for k, s in SHAPES.items()})
    rows = torch.randn(B, layout.dim, dtype=torch.float64)
    return Objective(loss, layout, X), rows


def flat(gradient):
    return torch.cat([gradient[name].flatten() for name in SHAPES])


def of_task(loss, layout, rows, task):
    return layout.unflatten(rows[task]), lambda params: torch.func.grad(loss)(params, X[task])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_and_products_are_those_of_each_task(loss):
    objective, rows = make(loss)
    v = torch.randn_like(rows)
    gradient = objective.gradient(rows)[1]
    linear = objective.linearise(rows, "hessian")
    product = linear.matvec(v)
    for task in range(B):
        params, grad = of_task(loss, objective.layout, rows, task)
        want, change = torch.func.jvp(grad, (params,), (objective.layout.unflatten(v[task]),))
        for got in (gradient, linear.gradient):
            torch.testing.assert_close(got[task], flat(want))
        torch.testing.assert_close(product[task], flat(change))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_result_is_not_written_by_later_passes(loss):
    objective, rows = make(loss)
    first = objective.gradient(rows)[1]
    matvec = objective.linearise(rows, "hessian").matvec
    v = torch.randn_like(rows)
    product = matvec(v)
    kept = first.clone(), product.clone()
    again = matvec(-2 * v)
    objective.gradient(rows + 1)
    assert torch.equal(first, kept[0])
    assert torch.equal(product, kept[1])
    torch.testing.assert_close(again, -2 * product)


def test_a_pass_that_fails_leaves_nothing_behind():
    objective, rows = make(tied)
    want = objective.gradient(rows)[1]
    leaf = rows.clone().requires_grad_()
    losses = objective.losses(leaf)
    leaf.register_hook(raise_error)
    with pytest.raises(ValueError, match="from the hook"), WritingRows():
        losses.sum().backward()
    with pytest.raises(ValueError, match="from the hook"), WritingRows():
        raise_error()
    assert destination(None, 0) is None
    assert torch.equal(objective.gradient(rows)[1], want)


def raise_error(*_):
    raise ValueError("from the hook")
