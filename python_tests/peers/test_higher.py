"""Cases of higher: test_patch (its models, forward, backward, unrolled SGD, mini-MAML), test_optim.

Re-created: MAML on modules with shared weights (a layer under two names, in nested modules and in
a sequence), with a parameter that the output does not use, with batch norm, and with one cell for
all steps of a recurrence; with SGD, momentum and a learned step size; the model afterwards. The
oracle is `torch.optim.SGD` on a deep copy of the model, and finite differences. Different inputs
in each inner step, and PyTorch's own recurrent layers, have no counterpart here.
"""

import copy

import pytest
import torch
from bilevel import descended, proximal, randn, same, tasks, value
from exact import EXACT
from method_problems import derivative
from torch import nn

from imaml_ext import FOMAML, MAML, GradientDescent, TaskBatch, implicit_meta_grad, module_loss


class Nested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Twice(nn.Module):
    """A layer that two nested modules share."""

    def __init__(self):
        super().__init__()
        self.first = Nested(nn.Linear(4, 4))
        self.second = Nested(self.first.inner)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.first(x).tanh() + self.second(x.square()))


class TiedTensor(nn.Module):
    """Two layers whose weight is the same parameter, transposed in one of them."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(4, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return nn.functional.linear(self.encoder(x).tanh(), self.decoder.weight.T)[:, :2]


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Parameter(torch.rand(4, 2))
        self.unused = nn.Parameter(torch.rand(4, 2))

    def forward(self, x):
        return (x @ self.used).tanh()


class Recurrence(nn.Module):
    """One cell for all steps: its weights are shared over time."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for step in x.split(2, dim=1):
            h = self.cell(torch.cat([step, h], dim=1)).tanh()
        return self.out(h)


def shared_in_a_sequence():
    layer = nn.Linear(4, 3)
    return nn.Sequential(
        layer, nn.Tanh(), nn.Linear(3, 4), nn.Sigmoid(), layer, nn.Tanh(), nn.Linear(3, 2)
    )


def simple():
    return nn.Sequential(
        nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2)
    )


def batch_norm():
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)
    )


MODELS = {
    "simple": simple,
    "a layer in two modules": Twice,
    "a layer twice in a sequence": shared_in_a_sequence,
    "a tied tensor": TiedTensor,
    "a parameter that is not used": PartlyUsed,
    "batch norm": batch_norm,
    "a recurrence": Recurrence,
}
mse = nn.functional.mse_loss


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param().double()


def batch(count=3, examples=8):
    return randn(count, examples, 4), randn(count, examples, 2)


def setting(model):
    return module_loss(model, mse), dict(model.named_parameters()), batch(), batch()


def moved(model, direction, h):
    """A copy of the model whose parameters are moved by h along the direction."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for p, d in zip(own.parameters(), direction, strict=True):
            p += h * d
    return own


def directional(model, value):
    """The derivative of `value`, a function of a model, along a random direction, and that."""
    direction = [torch.randn_like(p) for p in model.parameters()]
    zero = torch.zeros((), dtype=torch.float64)
    return derivative(lambda h: value(moved(model, direction, h)), zero, 1.0), direction


def along(gradients, direction):
    pairs = zip(gradients.values(), direction, strict=True)
    return sum((g * d).sum() for g, d in pairs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unrolled_maml_has_the_finite_differences_of_sgd_on_a_copy(model, momentum):
    loss, params, support, query = setting(model)

    def after_sgd(model):
        total = 0
        for own, (x, y) in zip(tasks(support), tasks(query), strict=True):
            total = total + mse(descended(model, mse, own, 0.1, 5, momentum=momentum)(x), y) / 3
        return total.detach()

    inner = GradientDescent(lr=0.1, steps=5, momentum=momentum)
    expected = after_sgd(model)
    want, direction = directional(model, after_sgd)
    out = MAML(loss, params, inner=inner).meta_gradient(TaskBatch(support, query))
    same([out.query_loss.mean()], [expected])
    same([along(out.params, direction)], [want], rtol=1e-6)  # of finite differences


def test_first_order_maml_has_the_gradient_of_the_copy_after_sgd(model):
    loss, params, support, query = setting(model)
    want = [torch.zeros_like(p) for p in params.values()]
    for own, (x, y) in zip(tasks(support), tasks(query), strict=True):
        copied = descended(model, mse, own, 0.1, 5)
        copied.zero_grad()
        mse(copied(x), y).backward()
        for total, p in zip(want, copied.parameters(), strict=True):
            total += 0 if p.grad is None else p.grad / 3
    inner = GradientDescent(lr=0.1, steps=5)
    out = FOMAML(loss, params, inner=inner).meta_gradient(TaskBatch(support, query))
    same(out.params.values(), want)


def test_implicit_maml_has_the_gradient_of_the_proximal_minimum(model):
    loss, params, support, query = setting(model)

    def plain(phi, data):
        return mse(torch.func.functional_call(model, phi, (data[0],)), data[1])

    lam = 10.0  # the objective is then convex
    bilevel = value(proximal(plain, params, lam), plain, params, support, query)
    want = torch.autograd.grad(bilevel, list(params.values()), allow_unused=True)
    out = implicit_meta_grad(loss, params, support, query, lam=lam, **EXACT)
    same([out.query_loss.mean()], [bilevel])
    # A parameter that neither loss uses gets no gradient in the oracle, and 0 here.
    same(
        out.params.values(),
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(params.values(), want, strict=True)
        ],
    )


@pytest.mark.parametrize("name", [n for n in MODELS if n != "a parameter that is not used"])
def test_a_learned_step_size_has_the_finite_differences_of_sgd(name):
    # higher's override of the learning rate of its differentiable optimizer.
    model = MODELS[name]().double()
    loss, params, support, query = setting(model)

    def after_sgd(log_lr):
        total = 0
        for own, (x, y) in zip(tasks(support), tasks(query), strict=True):
            total = total + mse(descended(model, mse, own, log_lr.exp().item(), 3)(x), y) / 3
        return total.detach()

    want = derivative(after_sgd, torch.tensor(0.1, dtype=torch.float64).log(), 1.0)
    method = MAML(loss, params, inner=GradientDescent(lr=0.1, steps=3), learn_lr=True)
    out = method.meta_gradient(TaskBatch(support, query))
    same([out.hyperparameters["log_lr"]], [want], rtol=1e-6)  # of finite differences


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, fails):
    loss, params, support, query = setting(model)
    before, expected = copy.deepcopy(model.state_dict()), model(support[0][0])
    if fails:
        wrong = support[0][..., :3], support[1]
        with pytest.raises(RuntimeError):
            implicit_meta_grad(loss, params, wrong, query, lam=1.0)
    else:
        implicit_meta_grad(loss, params, support, query, lam=1.0)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert dict(model.named_parameters()).keys() == params.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(model(support[0][0]), expected)
    assert torch.equal(copy.deepcopy(model)(support[0][0]), expected)
    model(support[0][0]).sum().backward()
