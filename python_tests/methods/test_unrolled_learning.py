"""What unrolled methods learn besides theta, against a loop over tasks in plain autograd.

Finite differences are those of the loop's mean query loss, with the gradients of its steps taken
without a graph.
"""

import pytest
import torch
from method_problems import derivative
from unrolled_loop import (
    THETA,
    Loop,
    adam_direction,
    batch,
    definite,
    momentum_direction,
    nesterov_direction,
    plain_direction,
    query_loss,
    shared,
    support_loss,
    theta,
)

from imaml_ext import (
    FOMAML,
    IMAML,
    MAML,
    Adam,
    GradientDescent,
    MultiStepLoss,
    Programs,
    ProximalStrength,
    Reptile,
    StepSize,
    TaskBatch,
    TruncatedMAML,
)
from imaml_ext._tracing import recording

SOLVERS = {
    "plain": (lambda **s: GradientDescent(**s), plain_direction),
    "heavy ball": (lambda **s: GradientDescent(momentum=0.7, **s), momentum_direction),
    "nesterov": (lambda **s: GradientDescent(momentum=0.7, nesterov=True, **s), nesterov_direction),
    "adam": (lambda **s: Adam(eps=0.1, **s), adam_direction),
}
STEP_SIZES = {  # settings, and the step size by the names of the learned tensors
    "scalar": ({}, lambda p, k, name: p["log_lr"].exp()),
    "scalar, steps": ({"steps": 3}, lambda p, k, name: p["log_lr"][k].exp()),
    "tensor": ({"form": "tensor"}, lambda p, k, name: p[f"log_lr.{name}"].exp()),
    "lslr": ({"form": "tensor", "steps": 3}, lambda p, k, name: p[f"log_lr.{name}"][k].exp()),
    "diagonal": ({"form": "diagonal"}, lambda p, k, name: p[f"log_lr.{name}"].exp()),
    "meta-sgd": ({"form": "diagonal", "positive": False}, lambda p, k, name: p[f"lr.{name}"]),
    "free scalar": ({"positive": False}, lambda p, k, name: p["lr"]),
    "diagonal, steps": (
        {"form": "diagonal", "steps": 3},
        lambda p, k, name: p[f"log_lr.{name}"][k].exp(),
    ),
}


def spread(module):
    """The module, with different values in all entries."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    return module


def exp_of(names):
    return lambda p, d: (
        torch.cat([p[n].exp().expand(s) for n, s in zip(names, (3, 1), strict=True)]) * d
    )


LAMS = {  # lam, and its product with a displacement
    "tensor": (
        lambda params: torch.tensor(0.7).double().requires_grad_(),
        lambda p, d: p["lam"] * d,
    ),
    "dict": (
        lambda params: {n: (0.5 + torch.rand_like(t)).requires_grad_() for n, t in params.items()},
        lambda p, d: torch.cat([p["lam.head"], p["lam.bias"][None]]) * d,
    ),
    "dense": (lambda params: definite(), lambda p, d: p["lam"] @ d),
    "strength": (
        lambda params: ProximalStrength(params, 0.8),
        lambda p, d: p["lam.log"].exp() * d,
    ),
    "strength, tensor": (
        lambda params: spread(ProximalStrength(params, 0.8, form="tensor")),
        exp_of(["lam.log.0", "lam.log.1"]),
    ),
    "strength, diagonal": (
        lambda params: spread(ProximalStrength(params, 0.8, form="diagonal")),
        lambda p, d: torch.cat([p["lam.log.0"], p["lam.log.1"][None]]).exp() * d,
    ),
}


def assert_is_gradient(method, got, data, loop):
    """By each learned tensor along a random direction; symmetric where lam is a matrix."""
    start = {name: tensor.detach() for name, tensor in method.learned().items()}
    assert got.named().keys() >= start.keys()
    for name, tensor in start.items():
        direction = torch.randn_like(tensor)
        if name == "lam" and tensor.dim() == 2:
            direction = direction + direction.T

        def value(h, name=name, direction=direction):
            return loop(start | {name: start[name] + h * direction}, data)

        want, along = derivative(value, 0.0, 1.0), (got.named()[name] * direction).sum()
        assert abs(want) > 1e-8, name
        torch.testing.assert_close(along, want, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("solver", SOLVERS)
def test_shared_parameters_have_their_effect_through_the_query_loss_and_the_steps(solver):
    make, direction = SOLVERS[solver]
    method = MAML(
        support_loss, theta(), shared=shared(), inner=make(lr=0.1, steps=3), query_loss=query_loss
    )
    data = batch()
    got = method.meta_gradient(data)
    assert got.shared.keys() == method.shared.keys()
    loop = Loop(direction=direction)
    assert_is_gradient(method, got, data, loop)
    torch.testing.assert_close(got.query_loss.mean(), loop(method.learned(), data).detach())


@pytest.mark.parametrize("form", STEP_SIZES)
@pytest.mark.parametrize("solver", ["plain", "adam"])
def test_step_sizes_of_every_form_have_the_right_gradient(solver, form):
    make, direction = SOLVERS[solver]
    settings, lr = STEP_SIZES[form]
    params = theta()
    rate = spread(StepSize(params, 0.07, **settings))
    method = MAML(
        support_loss, params, shared=shared(), inner=make(lr=rate, steps=3), query_loss=query_loss
    )
    data = batch()
    got = method.meta_gradient(data)
    assert got.hyperparameters.keys() == rate.named().keys()
    assert_is_gradient(method, got, data, Loop(direction=direction, lr=lr))


@pytest.mark.parametrize("form", LAMS)
def test_lam_of_every_form_has_the_right_gradient_through_the_steps(form):
    make, pull = LAMS[form]
    params = theta()
    inner = GradientDescent(lr=0.1, steps=3, momentum=0.7)
    method = MAML(
        support_loss, params, lam=make(params), shared=shared(), inner=inner, query_loss=query_loss
    )
    data = batch()
    got = method.meta_gradient(data)
    assert_is_gradient(method, got, data, Loop(direction=momentum_direction, pull=pull))
    implicit = IMAML(support_loss, params, lam=method.lam, shared=method.shared)
    assert implicit.learned().keys() == method.learned().keys()
    same = implicit.meta_gradient(data).named()
    assert {n: t.shape for n, t in same.items()} == {n: t.shape for n, t in got.named().items()}


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [0.0, 0.9, 0.1], [0.5, 0.5, 0.0]])
@pytest.mark.parametrize("recorded", [False, True])
def test_weighted_steps_add_the_query_losses_after_each(weights, recorded):
    settings, lr = STEP_SIZES["lslr"]
    params = theta()
    inner = GradientDescent(lr=spread(StepSize(params, **settings)), steps=3)
    method = MAML(
        support_loss, params, shared=shared(), inner=inner, query_loss=query_loss,
        step_weights=torch.tensor(weights, dtype=torch.float64),
    )  # fmt: skip
    data = batch()
    if recorded:
        with recording():
            got = method.meta_gradient(data)
    else:
        got = method.meta_gradient(data)
    loop = Loop(lr=lr, weights=weights)
    want = loop.gradients(method.learned(), data)
    for name, gradient in want.items():
        torch.testing.assert_close(got.named()[name], gradient, rtol=1e-10, atol=1e-12)
    if weights[2] == 0.5:
        assert_is_gradient(method, got, data, loop)


def method_and_loop(kind, solver="heavy ball", step_size="lslr", lam=None):
    make, direction = SOLVERS[solver]
    settings, lr = STEP_SIZES[step_size]
    params = theta()
    inner = make(lr=spread(StepSize(params, 0.07, **settings)), steps=3)
    common = {"shared": shared(), "query_loss": query_loss, "inner": inner}
    pull = None
    if lam is not None:
        common["lam"], pull = LAMS[lam][0](params), LAMS[lam][1]
    kinds = {
        "maml": (MAML, {}, {}),
        "truncated": (TruncatedMAML, {"last": 2}, {"last": 2}),
        "first order": (FOMAML, {}, {"first_order": True}),
    }
    method, own, loops = kinds[kind]
    method = method(support_loss, params, **common, **own)
    return method, Loop(direction=direction, lr=lr, pull=pull, **loops)


@pytest.mark.parametrize(
    ("kind", "solver", "step_size", "lam"),
    [
        ("maml", "nesterov", "diagonal, steps", "dense"),
        ("maml", "adam", "lslr", "dict"),
        ("truncated", "heavy ball", "lslr", None),
        ("truncated", "adam", "meta-sgd", "tensor"),
        ("first order", "plain", "scalar", None),
        ("first order", "adam", "lslr", None),
    ],
)
def test_every_gradient_is_that_of_a_loop_over_tasks(kind, solver, step_size, lam):
    method, loop = method_and_loop(kind, solver, step_size, lam)
    data = batch()
    want = loop.gradients(method.learned(), data)
    with Programs().use():
        got = method.meta_gradient(data).named()
    for name, gradient in want.items():
        if name == "lam" and gradient.dim() == 2:
            gradient = 0.5 * (gradient + gradient.T)
        assert gradient.abs().max() > 1e-6 or (kind == "first order" and name.startswith("log_"))
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)


def reptile_gradients(method, data):
    """theta - phi, and the mean gradient by the shared parameters along the way."""
    inner, count = method.inner, len(data.support[0])
    totals = {name: torch.zeros_like(t) for name, t in method.learned().items()}
    for i in range(count):
        own, other = (tuple(t[i] for t in part) for part in (data.support, data.query))
        phi = {name: method.params[name].detach().clone().requires_grad_() for name in THETA}
        psi = {name: t.detach().clone().requires_grad_() for name, t in method.shared.items()}
        optimizer = torch.optim.Adam(phi.values(), lr=inner.lr, eps=inner.eps)
        for step in range(inner.steps):
            optimizer.zero_grad()
            support_loss(phi | psi, other if step % 2 else own).backward()
            optimizer.step()
        for name in totals:
            moved = psi[name].grad / inner.steps if name in psi else method.params[name] - phi[name]
            totals[name] += moved.detach() / count
    return totals


def test_reptile_has_the_mean_gradient_of_shared_parameters_where_it_steps():
    inner = Adam(lr=0.05, steps=5, eps=0.1)
    method, data = Reptile(support_loss, theta(), shared=shared(), inner=inner), batch()
    got = method.meta_gradient(data).named()
    for name, want in reptile_gradients(method, data).items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-12)


# ---- the annealed weights of MAML++


def authors_weights(steps, anneal, epoch):
    """As the authors' code computes them; after `anneal` epochs it uses the last loss alone."""
    if epoch >= anneal:
        return [0.0] * (steps - 1) + [1.0]
    smallest = 0.03 / steps
    others = max(1 / steps - epoch / steps / anneal, smallest)
    last = min(1 / steps + epoch * (steps - 1) / steps / anneal, 1 - (steps - 1) * smallest)
    return [others] * (steps - 1) + [last]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_annealed_weights_are_those_of_the_authors(steps):
    schedule = MultiStepLoss(steps, anneal=50)
    for meta_step in (0, 1, 25, 48, 49, 50, 1000):
        got = schedule(torch.tensor(meta_step))
        want = torch.tensor(authors_weights(steps, 50, meta_step), dtype=torch.float64)
        torch.testing.assert_close(got, want)


def test_a_schedule_gets_the_meta_step():
    data, params, psi = batch(), theta(), shared()
    inner = GradientDescent(steps=2)

    def gradient(weights, step=None):
        method = MAML(support_loss, params, shared=psi, inner=inner, step_weights=weights)
        if step is not None:
            method.at_step(step)
        return method.meta_gradient(data).params["head"]

    annealed = MultiStepLoss(2, anneal=4)
    for step in (0, 1, torch.tensor(3), 4):
        weights = torch.tensor(authors_weights(2, 4, int(step)), dtype=torch.float64)
        torch.testing.assert_close(gradient(annealed, step), gradient(weights))
    assert torch.equal(gradient(annealed), gradient(annealed, 0))


# ---- step sizes and Adam


def test_the_steps_of_adam_have_finite_derivatives_at_a_gradient_of_zero():
    def loss(params, data):
        return (params["a"] ** 2).sum() + 0 * params["b"].sum() + 0 * data.sum()

    params = {"a": torch.zeros(2).double().requires_grad_()}
    params["b"] = torch.ones(2).double().requires_grad_()
    data = TaskBatch(torch.ones(3, 1).double(), torch.ones(3, 1).double())

    def moved(params, data):
        return (params["a"] + params["b"]).sum()

    inner = Adam(lr=1e-3, eps=0.1, steps=1)
    got = MAML(loss, params, inner=inner, query_loss=moved).meta_gradient(data)
    torch.testing.assert_close(got.params["a"], torch.full((2,), 1 - 2 * 1e-3 / 0.1).double())
    torch.testing.assert_close(got.params["b"], torch.ones(2).double())


def test_learn_lr_is_a_scalar_step_size_named_as_before():
    method = MAML(support_loss, theta(), shared=shared(), inner=Adam(lr=0.05), learn_lr=True)
    assert isinstance(method.inner.lr, StepSize)
    assert method.hyperparameters().keys() == {"log_lr"}
    torch.testing.assert_close(method.learned()["log_lr"].exp(), torch.tensor(0.05).double())
    torch.testing.assert_close(method.inner.lr(), torch.tensor(0.05).double())


def test_a_frozen_step_size_is_constant():
    params, psi, data = theta(), shared(), batch()
    rate = spread(StepSize(params, form="diagonal", steps=3))
    settings = {"shared": psi, "inner": GradientDescent(lr=rate, steps=3)}
    free = MAML(support_loss, params, **settings).meta_gradient(data)
    rate.requires_grad_(False)
    method = MAML(support_loss, params, **settings)
    assert method.hyperparameters() == {}
    got = method.meta_gradient(data)
    assert all(torch.equal(got.params[name], free.params[name]) for name in params)
    rate.values[0].requires_grad_(True)
    got = method.meta_gradient(data).hyperparameters
    assert got.keys() == {"log_lr.head"}
    torch.testing.assert_close(got["log_lr.head"], free.hyperparameters["log_lr.head"])
