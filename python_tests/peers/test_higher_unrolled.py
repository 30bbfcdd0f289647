"""MAML++, Meta-SGD, ANIL and differentiable Adam, against the same methods written with higher.

higher's Adam adds eps to the square root of the second moment before its correction, where
`torch.optim.Adam` does it after: eps is overridden in each step to make them equal.
"""

import pytest
import torch
from bilevel import randn, same, tasks
from torch import nn

from imaml_ext import MAML, Adam, GradientDescent, StepSize, TaskBatch, module_loss

higher = pytest.importorskip("higher")
mse = nn.functional.mse_loss


def setting():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = TaskBatch(*((randn(3, 6, 3), randn(3, 6, 2)) for _ in range(2)))
    return model, module_loss(model, mse), dict(model.named_parameters()), batch


def higher_gradients(model, adapted, batch, wanted, optimizer, override, weights):
    """Of the mean over tasks of the weighted query losses, one step after another."""
    groups = [{"params": [tensor]} for tensor in adapted]
    steps, total = len(weights), 0.0
    for own, held_out in zip(tasks(batch.support), tasks(batch.query), strict=True):
        made = optimizer(groups)
        with higher.innerloop_ctx(model, made, copy_initial_weights=False) as (fmodel, diffopt):
            for step in range(steps):
                diffopt.step(mse(fmodel(own[0]), own[1]), override=override(step))
                if weights[step]:
                    total = total + weights[step] * mse(fmodel(held_out[0]), held_out[1]) / 3
    return torch.autograd.grad(total, wanted)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def test_maml_plus_plus_agrees_with_higher():
    model, loss, params, batch = setting()
    rate = StepSize(params, 0.1, form="tensor", steps=3)
    with torch.no_grad():
        for value in rate.values:
            value += 0.3 * torch.rand_like(value)
    weights = [0.2, 0.3, 0.5]
    method = MAML(
        loss, params, inner=GradientDescent(lr=rate, steps=3),
        step_weights=torch.tensor(weights, dtype=torch.float64),
    )  # fmt: skip
    got = method.meta_gradient(batch).named()
    want = higher_gradients(
        model, params.values(), batch, [*method.learned().values()], sgd,
        lambda step: {"lr": [value[step].exp() for value in rate.values]}, weights,
    )  # fmt: skip
    same([got[name] for name in method.learned()], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("positive", [True, False])
def test_meta_sgd_agrees_with_higher(positive):
    model, loss, params, batch = setting()
    rate = StepSize(params, 0.1, form="diagonal", positive=positive)
    method = MAML(loss, params, inner=GradientDescent(lr=rate, steps=2))
    got = method.meta_gradient(batch).named()
    want = higher_gradients(
        model, params.values(), batch, [*method.learned().values()], sgd,
        lambda step: {"lr": list(rate().values())}, [0, 1],
    )  # fmt: skip
    same([got[name] for name in method.learned()], want, rtol=1e-10, atol=1e-12)


def test_anil_agrees_with_higher():
    model, loss, params, batch = setting()
    head = {name: t for name, t in params.items() if name.startswith("2.")}
    body = {name: t for name, t in params.items() if name not in head}
    method = MAML(loss, head, shared=body, inner=GradientDescent(lr=0.1, steps=3))
    got = method.meta_gradient(batch).named()
    want = higher_gradients(
        model, head.values(), batch, [*method.learned().values()], sgd,
        lambda step: None, [0, 0, 1],
    )  # fmt: skip
    same([got[name] for name in method.learned()], want, rtol=1e-10, atol=1e-12)


def test_maml_with_adam_agrees_with_higher():
    model, loss, params, batch = setting()
    rate, eps = StepSize(params, 0.05), 0.1
    method = MAML(loss, params, inner=Adam(lr=rate, steps=3, eps=eps))
    got = method.meta_gradient(batch).named()
    want = higher_gradients(
        model, params.values(), batch, [*method.learned().values()],
        lambda groups: torch.optim.Adam(groups, lr=0.05, eps=eps),
        lambda step: {"lr": [rate()], "eps": [eps * (1 - 0.999 ** (step + 1)) ** 0.5]}, [0, 0, 1],
    )  # fmt: skip
    same([got[name] for name in method.learned()], want, rtol=1e-10, atol=1e-12)
