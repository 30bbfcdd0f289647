"""Cases of Betty: learning to reweight, learning by ignoring, DARTS, logistic regression with HPO.

Re-created: a weight for each training example of all tasks, or of each task; a weighting network,
inside the loss and outside of it; labels that are corrected; mixing weights of candidate operations
in a convex and in a deep model; all against the gradient of the minimum. Betty's schedule of
several problems, and its one-step approximation of DARTS, have no counterpart here.
"""

import pytest
import torch
from bilevel import minimum, proximal, randn, same, tasks, value
from exact import CG, EXACT, QUICK
from torch import nn
from torch.func import functional_call, vmap

from imaml_ext import LBFGS, adapt, implicit_meta_grad

FEATURES, EXAMPLES = 4, 12
ZERO = {"w": torch.zeros(FEATURES, dtype=torch.float64)}


def batch(count=3, examples=EXAMPLES):
    x = randn(count, examples, FEATURES)
    return x, ((x @ randn(count, FEATURES, 1))[..., 0] + 0.5 * randn(count, examples) > 0).double()


def each(params, x, y):
    logits = x @ params["w"]
    return nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")


def plain(params, data):
    return each(params, *data).mean()


def weighted(params, data):
    x, y, weight = data
    return (weight * each(params, x, y)).mean()


def query_gradient(phi, query, tensors):
    vmap(plain)(phi, query).mean().backward()
    return [t.grad for t in tensors]


def test_one_weight_for_each_example_number_has_the_gradient_of_the_minimum():
    support, query = batch(), batch()
    logits = randn(EXAMPLES).requires_grad_()

    def reweighted(params, data):
        return weighted(params, (*data, params["logits"].sigmoid()))

    def inner(phi, data):
        return reweighted(phi | {"logits": logits}, data)

    bilevel = value(proximal(inner, ZERO, 0.3), plain, ZERO, support, query)
    (want,) = torch.autograd.grad(bilevel, logits)
    out = implicit_meta_grad(
        reweighted, ZERO, support, query, lam=0.3, query_loss=plain, shared={"logits": logits},
        **EXACT,
    )  # fmt: skip
    same([out.shared["logits"]], [want])
    phi = adapt(reweighted, ZERO, support, lam=0.3, shared={"logits": logits}, **EXACT)
    same(query_gradient(phi, query, [logits]), [want])


def test_one_weight_for_each_example_of_each_task_has_the_gradient_of_the_minimum():
    (x, y), query = batch(), batch()
    weight = torch.rand(3, EXAMPLES, dtype=torch.float64, requires_grad=True)
    bilevel = value(proximal(weighted, ZERO, 0.3), plain, ZERO, (x, y, weight), query)
    want = torch.autograd.grad(bilevel, weight)
    phi = adapt(weighted, ZERO, (x, y, weight), lam=0.3, **EXACT)
    same(query_gradient(phi, query, [weight]), want)


def weighting_network():
    network = nn.Sequential(nn.Linear(FEATURES + 1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid())
    return network.double()


def inputs(x, y):
    return torch.cat([x, y[..., None]], dim=-1)


@pytest.mark.parametrize("place", ["in the loss", "outside"])
def test_a_weighting_network_has_the_gradient_of_the_minimum(place):
    support, query, network = batch(), batch(), weighting_network()
    named = dict(network.named_parameters())
    weights = network(inputs(*support))[..., 0]
    bilevel = value(proximal(weighted, ZERO, 0.3), plain, ZERO, (*support, weights), query)
    want = torch.autograd.grad(bilevel, list(named.values()))

    def reweighted(params, data):
        own = {name: params[name] for name in named}
        return weighted(params, (*data, functional_call(network, own, (inputs(*data),))[..., 0]))

    if place == "outside":
        data = (*support, network(inputs(*support))[..., 0])
        phi = adapt(weighted, ZERO, data, lam=0.3, **EXACT)
    else:
        phi = adapt(reweighted, ZERO, support, lam=0.3, shared=named, **EXACT)
    same(query_gradient(phi, query, named.values()), want)


def test_learned_weights_fall_where_the_labels_were_flipped():
    x = randn(3, 40, FEATURES)
    true = (x @ randn(3, FEATURES, 1))[..., 0]
    y = (true > 0).double()
    flipped = torch.zeros(40, dtype=torch.bool)
    flipped[:12] = True
    support = x, torch.where(flipped, 1 - y, y)
    logits = torch.zeros(3, 40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(10):
        phi = adapt(weighted, ZERO, (*support, logits.sigmoid()), lam=0.1, **QUICK)
        optimizer.zero_grad()
        vmap(plain)(phi, (x, y)).mean().backward()
        optimizer.step()
    weights = logits.detach().sigmoid()
    assert weights[:, flipped].mean() < 0.2
    assert weights[:, ~flipped].mean() > 0.6


def test_corrected_labels_have_the_gradient_of_the_minimum():
    (x, y), query = batch(), batch()
    correction = randn(3, EXAMPLES).requires_grad_()

    def corrected():
        return (2 * y - 1 + correction).sigmoid()

    bilevel = value(proximal(plain, ZERO, 0.3), plain, ZERO, (x, corrected()), query)
    want = torch.autograd.grad(bilevel, correction)
    phi = adapt(plain, ZERO, (x, corrected()), lam=0.3, **EXACT)
    same(query_gradient(phi, query, [correction]), want)


OPERATIONS = [torch.tanh, torch.sin, lambda t: t, torch.zeros_like]


def mixture(alpha, outputs):
    return sum(a * t for a, t in zip(alpha.softmax(0), outputs, strict=True))


def convex_mixture(params, data):
    x, y = data
    heads = params["heads"]  # one for each operation
    outputs = [operation(x) @ w for operation, w in zip(OPERATIONS, heads, strict=True)]
    return (mixture(params["alpha"], outputs) - y).square().mean()


def deep_mixture(params, data):
    x, y = data
    hidden = x @ params["first"]
    cell = mixture(params["alpha"], [operation(hidden) for operation in OPERATIONS])
    return (cell @ params["second"] - y).square().mean()


def regression(count=3, examples=EXAMPLES):
    return randn(count, examples, FEATURES), randn(count, examples)


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_mixing_weights_of_operations_have_the_gradient_of_the_minimum(lam):
    support, query, alpha = regression(), regression(), randn(4).requires_grad_()
    theta = {"heads": randn(4, FEATURES).requires_grad_()}

    def loss(phi, data):
        return convex_mixture(phi | {"alpha": alpha}, data)

    bilevel = value(proximal(loss, theta, lam), loss, theta, support, query)
    want = torch.autograd.grad(bilevel, [alpha, theta["heads"]])
    out = implicit_meta_grad(
        convex_mixture, theta, support, query, lam=lam, shared={"alpha": alpha}, **EXACT
    )
    same([out.shared["alpha"], out.params["heads"]], want)  # with the direct part by alpha
    phi = adapt(convex_mixture, theta, support, lam=lam, shared={"alpha": alpha}, **EXACT)
    alpha.grad = theta["heads"].grad = None
    vmap(loss)(phi, query).mean().backward()
    same([alpha.grad, theta["heads"].grad], want)


def test_mixing_weights_of_a_deep_model_have_the_gradient_of_its_minimum():
    support, query, alpha = regression(), regression(), randn(4).requires_grad_()
    theta = {"first": 0.5 * randn(FEATURES, 3), "second": 0.5 * randn(3)}
    out = implicit_meta_grad(
        deep_mixture, theta, support, query, lam=1.0, shared={"alpha": alpha}, linear=CG,
        inner=LBFGS(steps=300, tol=1e-11),
    )  # fmt: skip
    losses = []

    def loss(phi, data):
        return deep_mixture(phi | {"alpha": alpha}, data)

    for start, own, held_out in zip(
        tasks(out.adapted), tasks(support), tasks(query), strict=True
    ):  # the oracle's minimum next to ours: there may be others
        inner = proximal(loss, theta, 1.0)
        phi = minimum(lambda phi, own=own, inner=inner: inner(phi, own), start)
        same(phi.values(), start.values())
        losses.append(loss(phi, held_out))
    same([out.shared["alpha"]], torch.autograd.grad(torch.stack(losses).mean(), alpha))
