"""Cases of MetaOptNet and R2-D2: convex heads on learned features (classification_heads.py), and
learn2learn's test of its SVM head.

Re-created: heads by ridge regression, logistic regression and a multi-class SVM with squared hinge
loss, whose features come from a body with batch norm; the gradients of the body, of the strength
and of a learned scale of the outputs. The oracles are the dual closed form of R2-D2 and dense
Newton steps. The hinge loss itself (a quadratic program) has no counterpart here.
"""

import pytest
import torch
from bilevel import number, proximal, randn, same, value
from exact import EXACT
from torch import nn
from torch.func import vmap

from imaml_ext import ProximalStrength, adapt, implicit_meta_grad

WAY, SHOT, FEATURES, TASKS = 3, 4, 5, 3
ZERO = {"w": torch.zeros(FEATURES, WAY, dtype=torch.float64)}


def make_body():
    body = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, FEATURES)
    ).double()
    return body, list(body.parameters())


def embed(body, images):
    """Features of all images of all tasks at once; batch norm is that of ordinary training."""
    return body(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def episode():
    centres = randn(TASKS, WAY, 1, 6)
    labels = torch.arange(WAY).repeat_interleave(SHOT).expand(TASKS, WAY * SHOT)
    images = [(centres + 0.5 * randn(TASKS, WAY, SHOT, 6)).flatten(1, 2) for _ in range(2)]
    return *images, labels


def one_hot(labels):
    return nn.functional.one_hot(labels, WAY).double()


def ridge(params, data):
    x, labels = data
    return 0.5 * (x @ params["w"] - one_hot(labels)).square().sum()


def logistic(params, data):
    x, labels = data
    return nn.functional.cross_entropy(x @ params["w"], labels, reduction="sum")


def svm(params, data):
    """Each class against the rest (Lee, Lin, Wahba), the hinge squared."""
    x, labels = data
    signs = 2 * one_hot(labels) - 1
    return (1 - signs * (x @ params["w"])).clamp_min(0).square().sum()


def scaled_cross_entropy(scale):
    return lambda params, data: nn.functional.cross_entropy(
        scale * (data[0] @ params["w"]), data[1]
    )


HEADS = {"ridge": ridge, "logistic": logistic, "svm": svm}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_body_under_a_convex_head_has_the_gradient_of_its_minimum(head):
    (body, parameters), (support, query, labels) = make_body(), episode()
    strength, scale = number(1.5), number(2.0)
    learned = [*parameters, strength, scale]

    def features():
        both = embed(body, torch.cat([support, query], dim=1))
        return both.split(WAY * SHOT, dim=1)

    own, held_out = features()
    outer = scaled_cross_entropy(scale)
    inner = proximal(head, ZERO, strength)
    want = torch.autograd.grad(
        value(inner, outer, ZERO, (own, labels), (held_out, labels)), learned
    )
    own, held_out = features()
    phi = adapt(head, ZERO, (own, labels), lam=strength, **EXACT)
    vmap(outer)(phi, (held_out, labels)).mean().backward()
    same([t.grad for t in learned], want)


@pytest.mark.parametrize("start", ["zero", "learned"])
def test_a_ridge_head_has_the_gradient_of_the_dual_closed_form_of_r2d2(start):
    # w = theta + X' (X X' + lam I)^-1 (Y - X theta)
    (body, parameters), (support, query, labels) = make_body(), episode()
    theta = ZERO["w"].clone() if start == "zero" else randn(FEATURES, WAY)
    theta.requires_grad_()
    strength = ProximalStrength({"w": theta}, initial=0.8)
    learned = [*parameters, theta, strength.log]

    def loss_of(weights, held_out):
        return nn.functional.cross_entropy((held_out @ weights).flatten(0, 1), labels.flatten())

    x, held_out = embed(body, support), embed(body, query)
    gram = x @ x.mT + strength.log.exp() * torch.eye(WAY * SHOT, dtype=torch.float64)
    dual = theta + x.mT @ torch.linalg.solve(gram, one_hot(labels) - x @ theta)
    want = torch.autograd.grad(loss_of(dual, held_out), learned)
    x, held_out = embed(body, support), embed(body, query)
    phi = adapt(ridge, {"w": theta}, (x, labels), lam=strength(), **EXACT)
    loss_of(phi["w"], held_out).backward()
    same([t.grad for t in learned], want)


def test_the_body_and_the_shared_body_of_anil_have_the_same_gradient():
    # Features as data, computed once, or in the loss, with the body as `shared`.
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, FEATURES)).double()
    support, query, labels = episode()
    named = dict(body.named_parameters())

    def through_body(params, data):
        own = {name: params[name] for name in named}
        return logistic(params, (torch.func.functional_call(body, own, (data[0],)), data[1]))

    out = implicit_meta_grad(
        through_body, ZERO, (support, labels), (query, labels), lam=1.0, shared=named, **EXACT
    )
    phi = adapt(logistic, ZERO, (body(support), labels), lam=1.0, **EXACT)
    vmap(logistic)(phi, (body(query), labels)).mean().backward()
    same([p.grad for p in named.values()], out.shared.values())


def test_features_in_a_graph_are_refused_where_their_gradient_would_be_lost():
    (body, _), (support, query, labels) = make_body(), episode()
    data = embed(body, support), labels
    with pytest.raises(ValueError, match="adapt"):
        implicit_meta_grad(ridge, ZERO, data, (query[..., :FEATURES], labels), lam=1.0, **EXACT)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_classifies_the_examples_that_it_was_fitted_to(head, normalise):
    # learn2learn's test: images of one class are equal, and require grad.
    images = randn(TASKS, WAY, 1, 6).expand(TASKS, WAY, SHOT, 6).flatten(1, 2).requires_grad_()
    labels = torch.arange(WAY).repeat_interleave(SHOT).expand(TASKS, WAY * SHOT)
    x = nn.functional.normalize(images, dim=-1) if normalise else images
    start = {"w": torch.zeros(6, WAY, dtype=torch.float64)}
    phi = adapt(head, start, (x, labels), lam=0.1, **EXACT)
    outputs = x @ phi["w"]
    assert (outputs.argmax(-1) == labels).all()
    nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten()).backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().amax((1, 2)).min() > 0
