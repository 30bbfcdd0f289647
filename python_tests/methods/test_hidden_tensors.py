"""Tensors that require grad and reach a loss otherwise than as params, shared or data."""

import functools

import pytest
import torch
from ridge_problems import EXACT, LAM, data, fit, learned, squared
from torch import nn
from torch.func import vmap

from imaml_ext import (
    FOMAML,
    LBFGS,
    MAML,
    ConjugateGradient,
    HessianFree,
    TaskBatch,
    adapt,
    implicit_meta_grad,
    module_loss,
)

STRENGTH = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def closed_over(p, d):
    return fit(p, d) + STRENGTH * p["w"].square().sum()


def computed_before():
    decay = STRENGTH.exp()
    return lambda p, d: fit(p, d) + decay * p["w"].square().sum()


def with_default(p, d, strength=STRENGTH):
    return fit(p, d) + strength * p["w"].square().sum()


def through_a_helper():
    def penalty(w):
        return STRENGTH * w.square().sum()

    return lambda p, d: fit(p, d) + penalty(p["w"])


class Regularised:
    def __init__(self):
        self.strength = STRENGTH

    def __call__(self, p, d):
        return fit(p, d) + self.strength * p["w"].square().sum()

    def loss(self, p, d):
        return self(p, d)


HIDDEN = {
    "a global": (lambda: closed_over, "STRENGTH"),
    "computed from a leaf": (computed_before, "decay"),
    "an attribute": (Regularised, "strength"),
    "of a method's object": (lambda: Regularised().loss, "strength"),
    "a default": (lambda: with_default, "strength"),
    "used by a helper": (through_a_helper, "STRENGTH"),
    "an argument of a partial": (
        lambda: functools.partial(lambda p, d, s: fit(p, d) + s * p["w"].sum(), s=STRENGTH),
        "s",
    ),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_tensor_that_the_loss_closes_over_is_named(kind):
    loss, name = HIDDEN[kind][0](), HIDDEN[kind][1]
    message = f"the loss depends on {name}, which requires grad, .* pass it in shared="
    with pytest.raises(ValueError, match=message):
        adapt(loss, learned(), data(), lam=LAM)
    for inner in (LBFGS(steps=2), HessianFree(steps=2, linear=ConjugateGradient())):
        with pytest.raises(ValueError, match=message):
            adapt(loss, learned(), data(), lam=LAM, inner=inner)
    with pytest.raises(ValueError, match=message):
        implicit_meta_grad(loss, learned(), data(), data(), lam=LAM)
    with pytest.raises(ValueError, match=message):  # in the query loss alone
        implicit_meta_grad(fit, learned(), data(), data(), lam=LAM, query_loss=loss)
    for method in (MAML, FOMAML):
        with pytest.raises(ValueError, match=message):
            method(loss, learned()).meta_gradient(TaskBatch(data(), data()))
    with torch.no_grad():
        adapt(loss, learned(), data(), lam=LAM)  # nothing is differentiated


def test_a_hidden_tensor_is_found_in_a_graph_too_large_to_be_searched():
    def loss(p, d):
        value = STRENGTH * p["w"].square().sum()
        for _ in range(12_000):
            value = value + 1e-4
        return value

    with pytest.raises(ValueError, match="the loss depends on STRENGTH, which requires grad"):
        implicit_meta_grad(loss, learned(), data(), data(), lam=LAM)


def test_a_body_left_in_the_model_is_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    head = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    loss = module_loss(model, lambda outputs, y: (outputs[:, 0] - y).square().mean())
    message = r"the loss depends on 0\.weight, 0\.bias, which require grad, .* pass them in shared="
    with pytest.raises(ValueError, match=message):
        adapt(loss, head, data(), lam=LAM)
    ggn = ConjugateGradient(curvature="ggn")
    for settings in ({"inner": HessianFree(steps=1)}, {"linear": ggn}):
        with pytest.raises(ValueError, match=message):
            adapt(loss, head, data(), lam=LAM, **settings)
        with pytest.raises(ValueError, match=message):
            implicit_meta_grad(loss, head, data(), data(), lam=LAM, **settings)
    model[0].requires_grad_(False)
    phi = adapt(loss, head, data(), lam=LAM, **EXACT)
    vmap(loss)(phi, data()).mean().backward()
    assert head["2.weight"].grad.norm() > 0


class Scaled(nn.Linear):
    factor = STRENGTH

    def forward(self, x):
        return self.factor * super().forward(x)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.others = nn.Linear(4, 1).double(), [nn.Linear(4, 1).double()]

    def forward(self, x):
        return self.own(x) + self.others[0](x)


@pytest.mark.parametrize(
    ("model", "name"), [(Scaled(4, 1).double(), "factor"), (Listed(), r"others\.weight")]
)
def test_a_tensor_that_is_no_parameter_of_the_model_is_named(model, name):
    with pytest.raises(ValueError, match=f"the loss depends on {name}.*, which require"):
        adapt(module_loss(model, squared), dict(model.named_parameters()), data(), lam=LAM)


@pytest.mark.parametrize("linear", [ConjugateGradient(), ConjugateGradient(curvature="ggn")])
def test_a_tensor_that_the_criterion_closes_over_is_named(linear):
    model = nn.Linear(4, 1).double()
    loss = module_loss(model, lambda outputs, y: STRENGTH * squared(outputs, y))
    with pytest.raises(ValueError, match="the loss depends on STRENGTH, which requires grad"):
        adapt(
            loss, dict(model.named_parameters()), data(), lam=LAM,
            inner=HessianFree(steps=1, linear=linear),
        )  # fmt: skip


def test_a_loss_that_calls_the_model_itself_is_rejected():
    model = nn.Linear(4, 1).double()
    params = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"depends on model\.weight, model\.bias of the model, not"
    ):
        implicit_meta_grad(
            lambda p, d: nn.functional.mse_loss(model(d[0])[:, 0], d[1]) + 0 * p["weight"].sum(),
            params, data(), data(), lam=LAM,
        )  # fmt: skip


@pytest.mark.parametrize("call", [adapt, lambda *a, **k: implicit_meta_grad(*a, a[-1], **k)])
def test_parameters_of_which_only_some_require_grad_are_rejected(call):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    loss = module_loss(model, lambda outputs, y: (outputs[:, 0] - y).square().mean())
    with pytest.raises(ValueError, match=r"params\['0.weight'\] does not require grad, but other"):
        call(loss, dict(model.named_parameters()), data(), lam=LAM)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = model[0].weight.clone()
    call(loss, learned, data(), lam=LAM)
    assert torch.equal(before, model[0].weight)


def test_a_shared_name_that_no_loss_can_use_is_rejected():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    head = {n: p for n, p in model.named_parameters() if n.startswith("1.")}
    loss = module_loss(model, squared)
    with pytest.raises(ValueError, match=r"shared\['body.weight'\] is used by no loss"):
        adapt(loss, head, data(), lam=LAM, shared={"body.weight": model[0].weight})
