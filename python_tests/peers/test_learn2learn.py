"""Cases of learn2learn: maml_test, gbml_test, metasgd_test, lightning_anil_test.

Re-created: adaptation of its model with a buffer, first-order gradients, a convolutional module
whose layers are registered under several names, parameters that a loss does not use, frozen layers,
ANIL, and a learned step size. The oracle unrolls the steps by plain autograd on
`functional_call`, or takes them with `torch.optim.SGD` on a copy. A step size for each parameter
(Meta-SGD), and learned transforms of gradients (GBML), have no counterpart here.
"""

import copy

import pytest
import torch
from bilevel import descended, number, proximal, randn, same, tasks, value
from exact import CG, EXACT
from torch import nn
from torch.func import functional_call, vmap

from imaml_ext import FOMAML, LBFGS, MAML, GradientDescent, TaskBatch, adapt, implicit_meta_grad
from imaml_ext import module_loss as build

mse = nn.functional.mse_loss
INNER = GradientDescent(lr=0.1, steps=3)


def network():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 4), nn.Softmax(-1)
    ).double()
    model.register_buffer("dummy", torch.zeros(1, 2, 3, 4).double())
    return model


class SeveralNames(nn.Module):
    """Layers that are registered under `seq` and `head`, and again under `net`."""

    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 1))
        self.net = nn.Sequential(self.seq, self.head)

    def forward(self, x):
        return self.net(x.view(len(x), 1, 8, 8)).flatten(1)


MODELS = {"dense": (network, 5), "several names": (lambda: SeveralNames().double(), 64)}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def setting(request):
    make, inputs = request.param
    batches = [(randn(3, 7, inputs), randn(3, 7, 4)) for _ in range(2)]
    return make(), *batches


def unrolled(model, params, support, query, lr=0.1):
    """The mean query loss after three steps on the given parameters, by plain autograd."""
    losses = []
    for own, held_out in zip(tasks(support), tasks(query), strict=True):
        phi = dict(params)
        for _ in range(3):
            loss = mse(functional_call(model, phi, (own[0],)), own[1])
            slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {n: p - lr * g for (n, p), g in zip(phi.items(), slopes, strict=True)}
        losses.append(mse(functional_call(model, phi, (held_out[0],)), held_out[1]))
    return torch.stack(losses).mean()


def test_adaptation_lowers_the_loss_and_every_parameter_gets_the_gradient_of_its_steps(setting):
    model, support, query = setting
    loss, params = build(model, mse), dict(model.named_parameters())
    want = torch.autograd.grad(unrolled(model, params, support, query), list(params.values()))
    before = vmap(loss, (None, 0))(params, support)
    out = MAML(loss, params, inner=INNER).meta_gradient(TaskBatch(support, query))
    same(out.params.values(), want)
    assert (out.support_loss < before).all()
    assert all(gradient.norm() > 0 for gradient in out.params.values())


def test_first_order_adaptation_has_the_gradient_of_the_adapted_copy(setting):
    model, support, query = setting
    params = dict(model.named_parameters())
    want = [torch.zeros_like(p) for p in params.values()]
    for own, (x, y) in zip(tasks(support), tasks(query), strict=True):
        copied = descended(model, mse, own, 0.1, 3)
        slopes = torch.autograd.grad(mse(copied(x), y), list(copied.parameters()))
        want = [total + g / 3 for total, g in zip(want, slopes, strict=True)]
    out = FOMAML(build(model, mse), params, inner=INNER).meta_gradient(TaskBatch(support, query))
    same(out.params.values(), want)


def test_the_model_and_its_buffer_are_left_as_they_were(setting):
    model, support, query = setting
    before, expected = copy.deepcopy(model.state_dict()), model(support[0][0])
    loss, params = build(model, mse), dict(model.named_parameters())
    MAML(loss, params, inner=INNER).meta_gradient(TaskBatch(support, query))
    implicit_meta_grad(loss, params, support, query, lam=1.0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(copy.deepcopy(model)(support[0][0]), expected)


def half_used(count):
    params = {f"p{i}": randn(3).requires_grad_() for i in range(count)}

    def support_loss(phi, data):
        return sum((phi[name] - data[0]).square().sum() for name in list(params)[::2])

    def query_loss(phi, data):
        return sum((phi[name] * data[0]).sin().sum() for name in params)

    return params, support_loss, query_loss, ((randn(3, 3),), (randn(3, 3),))


@pytest.mark.parametrize("method", ["maml", "imaml"])
def test_a_parameter_that_the_support_loss_does_not_use_keeps_its_direct_gradient(method):
    # It is not adapted, so that its meta-gradient is that of the query loss at theta.
    params, support_loss, query_loss, (support, query) = half_used(4)
    if method == "maml":
        out = MAML(
            support_loss, params, inner=GradientDescent(lr=0.1, steps=1), query_loss=query_loss
        ).meta_gradient(TaskBatch(support, query))
        factor = 1 - 0.1 * 2  # d phi / d theta of one step
    else:
        out = implicit_meta_grad(
            support_loss, params, support, query, lam=1.0, query_loss=query_loss, **EXACT
        )
        factor = 1 / (1 + 2)
    (a,), (b,) = support, query
    want = []
    for place, p in enumerate(params.values()):
        used = place % 2 == 0
        at = p + (1 - factor) * (a - p) if used else p.expand(3, 3)
        want.append(((factor if used else 1) * b * (at * b).cos()).mean(0))
    same(out.params.values(), want)


def frozen_middle():
    model = network()
    model[2].weight.requires_grad_(False)
    return model, dict(model.named_parameters())


CALLS = {
    "adapt": lambda loss, params, data: adapt(loss, params, data, lam=1.0),
    "implicit": lambda loss, params, data: implicit_meta_grad(loss, params, data, data, lam=1.0),
    "MAML": lambda loss, params, _: MAML(loss, params),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_frozen_layers_among_the_parameters_are_refused(call):
    model, params = frozen_middle()
    with pytest.raises(ValueError, match=r"2\.weight"):
        call(build(model, mse), params, (randn(3, 7, 5), randn(3, 7, 4)))


def test_frozen_layers_that_are_left_out_keep_their_value():
    model, params = frozen_middle()
    learned = {name: p for name, p in params.items() if p.requires_grad}
    support, query = ((randn(3, 7, 5), randn(3, 7, 4)) for _ in range(2))
    loss, weight = build(model, mse), model[2].weight.clone()
    want = torch.autograd.grad(unrolled(model, learned, support, query), list(learned.values()))
    out = MAML(loss, learned, inner=INNER).meta_gradient(TaskBatch(support, query))
    same(out.params.values(), want)
    phi = adapt(loss, learned, support, lam=1.0, inner=LBFGS(steps=100, tol=1e-9), linear=CG)
    assert phi.keys() == learned.keys()
    vmap(loss)(phi, query).mean().backward()
    assert all(p.grad.norm() > 0 for p in learned.values())
    assert torch.equal(model[2].weight, weight)
    assert model[2].weight.grad is None


def anil():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    named = dict(model.named_parameters())
    head = {name: p for name, p in named.items() if name.startswith("2.")}
    body = {name: p for name, p in named.items() if name not in head}
    return model, head, body, *((randn(3, 7, 5), randn(3, 7, 4)) for _ in range(2))


@pytest.mark.parametrize("body_in", ["shared", "the support's features"])
def test_anil_gives_head_and_body_the_gradient_of_the_adapted_heads(body_in):
    model, head, body, support, query = anil()

    def plain(phi, data):
        return mse(functional_call(model, {**body, **phi}, (data[0],)), data[1])

    bilevel = value(proximal(plain, head, 0.5), plain, head, support, query)
    want = torch.autograd.grad(bilevel, [*head.values(), *body.values()])
    if body_in == "shared":
        phi = adapt(build(model, mse), head, support, lam=0.5, shared=body, **EXACT)
        vmap(build(model, mse))(phi, query).mean().backward()
    else:
        loss = build(model[2], mse)
        own = {name.removeprefix("2."): p for name, p in head.items()}
        features = model[:2](support[0]), support[1]
        phi = adapt(loss, own, features, lam=0.5, **EXACT)
        vmap(loss)(phi, (model[:2](query[0]), query[1])).mean().backward()
    same([p.grad for p in [*head.values(), *body.values()]], want)


def test_a_trainable_body_that_is_left_in_the_model_is_refused_by_name():
    model, head, _, support, _ = anil()
    with pytest.raises(ValueError, match=r"(?s)0\.weight.*shared=|shared=.*0\.weight"):
        adapt(build(model, mse), head, support, lam=0.5, **EXACT)


def test_a_learned_step_size_has_the_gradient_of_its_steps():
    model = network()
    params, log_lr = dict(model.named_parameters()), number(-2.0)
    support, query = ((randn(3, 7, 5), randn(3, 7, 4)) for _ in range(2))
    inner = GradientDescent(lr=log_lr.exp().item(), steps=3)
    method = MAML(build(model, mse), params, inner=inner, learn_lr=True)
    out = method.meta_gradient(TaskBatch(support, query))
    losses = unrolled(model, params, support, query, lr=log_lr.exp())
    want = torch.autograd.grad(losses, [log_lr, *params.values()])
    same([out.hyperparameters["log_lr"], *out.params.values()], want)
