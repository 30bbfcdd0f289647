"""Cases of TorchOpt: test_implicit, test_meta_optim, test_linalg, test_optim.

Re-created: iMAML with `custom_root` (cross-entropy, a linear model of ones and zeros, the
logits as outer loss, an inner solver that has not converged) with each linear solver; several outer
steps; the same with a module; ridge regression whose regularisation is learned; unrolled SGD with
momentum as a meta-optimizer; conjugate gradient and Neumann series against a dense solve.
"""

import warnings

import pytest
import torch
from bilevel import minimum, number, proximal, randn, same, tasks, value
from exact import CG, EXACT
from torch import nn

from imaml_ext import (
    IMAML,
    MAML,
    MINRES,
    ConjugateGradient,
    GradientDescent,
    NeumannSeries,
    Status,
    TaskBatch,
    adapt,
    conjugate_gradient,
    implicit_meta_grad,
    module_loss,
)

INPUTS, CLASSES = 4, 3


def start():
    weight = torch.ones(INPUTS, CLASSES, dtype=torch.float64)
    return {"weight": weight, "bias": torch.zeros(CLASSES, dtype=torch.float64)}


def logits(params, x):
    return x @ params["weight"] + params["bias"]


def cross_entropy(params, data):
    x, y = data
    return nn.functional.cross_entropy(logits(params, x), y)


def outer(params, data):
    x, _ = data
    return logits(params, x).square().mean()  # the mean logit itself is linear in phi


def batch(count=3, examples=8):
    return randn(count, examples, INPUTS), torch.randint(CLASSES, (count, examples))


LINEAR = {
    "cg": CG,
    "minres": MINRES(max_iter=60, rtol=1e-13),
    "neumann series": NeumannSeries(max_iter=300, lr=0.5, rtol=1e-13),
}


@pytest.mark.parametrize("linear", LINEAR.values(), ids=LINEAR)
def test_imaml_has_the_gradient_of_the_proximal_minimum_with_every_linear_solver(linear):
    support, theta = batch(), {name: t.requires_grad_() for name, t in start().items()}
    want = torch.autograd.grad(
        value(proximal(cross_entropy, theta, 1.0), outer, theta, support, support),
        list(theta.values()),
    )
    phi = adapt(cross_entropy, theta, support, lam=1.0, inner=EXACT["inner"], linear=linear)
    torch.func.vmap(outer)(phi, support).mean().backward()
    same([t.grad for t in theta.values()], want)


def dense(theta, support, steps, lr):
    """The implicit formula of every task where gradient descent stops, with dense Hessians."""
    flat = torch.cat([t.detach().flatten() for t in theta.values()])
    sizes = [t.numel() for t in theta.values()]

    def named(row):
        return {n: p.view(theta[n].shape) for n, p in zip(theta, row.split(sizes), strict=True)}

    phis, gradients = [], []
    for data in tasks(support):

        def objective(row, data=data):
            return cross_entropy(named(row), data) + 0.5 * (row - flat).square().sum()

        row = flat
        for _ in range(steps):
            row = row - lr * torch.func.grad(objective)(row)
        v = torch.func.grad(lambda row, data=data: outer(named(row), data))(row)
        gradients.append(torch.linalg.solve(torch.func.hessian(objective)(row), v))
        phis.append(row)
    return torch.stack(phis), torch.stack(gradients).mean(0)


@pytest.mark.parametrize("steps", [1, 20])
def test_a_solution_that_has_not_converged_is_differentiated_where_it_is(steps):
    support, theta = batch(), start()
    phi, want = dense(theta, support, steps, 0.02)
    out = implicit_meta_grad(
        cross_entropy, theta, support, support, lam=1.0, query_loss=outer, linear=CG,
        inner=GradientDescent(lr=0.02, steps=steps),
    )  # fmt: skip
    same([torch.cat([t.flatten(1) for t in out.adapted.values()], 1)], [phi])
    same([torch.cat([t.flatten() for t in out.params.values()])], [want])
    assert (out.inner.status == Status.MAX_ITER).all()


def test_outer_steps_of_a_module_follow_those_of_the_formula():
    model = nn.Linear(INPUTS, CLASSES).double()
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = IMAML(
        module_loss(model, nn.functional.cross_entropy), dict(model.named_parameters()), lam=1.0,
        inner=GradientDescent(lr=0.02, steps=10), linear=CG,
        query_loss=module_loss(model, lambda outputs, _: outputs.square().mean()),
    )  # fmt: skip
    theta = start()
    for _ in range(3):
        support = batch()
        _, step = dense(theta, support, 10, 0.02)
        theta["weight"] = theta["weight"] - 0.1 * step[: INPUTS * CLASSES].view(INPUTS, CLASSES)
        theta["bias"] = theta["bias"] - 0.1 * step[INPUTS * CLASSES :]
        gradients = method.meta_gradient(TaskBatch(support, support)).named()
        for name, parameter in method.learned().items():
            parameter.grad = gradients[name]
        optimizer.step()
    same([model.weight, model.bias], [theta["weight"].T, theta["bias"]])


def test_the_regularisation_of_ridge_regression_is_learned_as_along_the_closed_form():
    w = {"w": randn(INPUTS)}
    regularisations = number(0.6), number(0.6)

    def ridge(params, data):
        x, y = data
        penalty = 0.5 * params["l2"] * params["w"].square().sum()
        return 0.5 * (x @ params["w"] - y).square().mean() + penalty

    def error(params, data):
        x, y = data
        return (x @ params["w"] - y).square().mean()

    optimizers = [torch.optim.SGD([l2], lr=0.1) for l2 in regularisations]
    for _ in range(4):
        x, y = randn(3, 10, INPUTS), randn(3, 10)
        query = randn(3, 10, INPUTS), randn(3, 10)
        learned, exact = regularisations
        phi = adapt(ridge, w, (x, y), lam=0.0, shared={"l2": learned}, **EXACT)
        torch.func.vmap(error)(phi, query).mean().backward()
        gram = x.mT @ x / 10 + exact * torch.eye(INPUTS, dtype=torch.float64)
        closed = torch.linalg.solve(gram, x.mT @ y[..., None] / 10)
        ((query[0] @ closed)[..., 0] - query[1]).square().mean().backward()
        same([learned.grad], [exact.grad])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same([regularisations[0]], [regularisations[1]])
    assert abs(regularisations[0].item() - 0.6) > 1e-3


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str
)
def test_unrolled_sgd_has_the_gradient_of_its_steps(settings):
    # The steps by plain autograd, with the momentum of torch.optim.SGD.
    support, query, theta = batch(), batch(), {n: t.requires_grad_() for n, t in start().items()}
    losses = []
    for own, held_out in zip(tasks(support), tasks(query), strict=True):
        phi, velocity = dict(theta), None
        for _ in range(5):
            slope = torch.autograd.grad(cross_entropy(phi, own), phi.values(), create_graph=True)
            beta = settings.get("momentum", 0.0)
            velocity = slope if velocity is None else [
                beta * v + g for v, g in zip(velocity, slope, strict=True)
            ]  # fmt: skip
            step = velocity
            if "nesterov" in settings:
                step = [g + beta * v for v, g in zip(velocity, slope, strict=True)]
            phi = {name: p - 0.1 * s for (name, p), s in zip(phi.items(), step, strict=True)}
        losses.append(cross_entropy(phi, held_out))
    want = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    method = MAML(cross_entropy, theta, inner=GradientDescent(lr=0.1, steps=5, **settings))
    out = method.meta_gradient(TaskBatch(support, query))
    same(out.params.values(), want)
    same([out.query_loss], [torch.stack(losses)])


def differentiate_twice(route, value, weight):
    """Second derivatives of `value`, a function of the weight, by one of autograd's routes."""
    if route == "functional.hessian":
        torch.autograd.functional.hessian(value, weight)
    elif route == "functional.hessian, vectorised":
        torch.autograd.functional.hessian(value, weight, vectorize=True)
    elif route == "autograd.grad":
        (gradient,) = torch.autograd.grad(value(weight), weight, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), weight)
    else:
        weight.requires_grad_()
        with warnings.catch_warnings():  # torch's, of a cycle between the gradient and its graph
            warnings.simplefilter("ignore")
            value(weight).backward(create_graph=True)
        weight.grad.square().sum().backward()


@pytest.mark.parametrize(
    "route", ["functional.hessian", "functional.hessian, vectorised", "autograd.grad", "backward"]
)
def test_second_derivatives_through_the_solution_are_refused(route):
    # TorchOpt's issue 223.
    support, theta = batch(), start()

    def value(weight):
        phi = adapt(cross_entropy, theta | {"weight": weight}, support, lam=1.0, **EXACT)
        return torch.func.vmap(outer)(phi, support).mean()

    theta["bias"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"once|twice|second|create_graph"):
        differentiate_twice(route, value, theta["weight"].requires_grad_())


def spd(count, size):
    root = randn(count, size, size)
    return root @ root.mT / size + torch.eye(size, dtype=torch.float64)


def test_conjugate_gradient_solves_each_system_of_a_batch():
    matrices, b = spd(5, 20), randn(5, 20)
    got = conjugate_gradient(
        lambda p: (matrices @ p[..., None])[..., 0], b, max_iter=40, rtol=1e-12
    )
    same([got.value], [torch.linalg.solve(matrices, b)])
    assert (got.status == Status.CONVERGED).all()


@pytest.mark.parametrize("terms", [1, 4, 200])
def test_a_neumann_series_is_the_sum_of_the_powers_of_the_matrix(terms):
    matrices, b = spd(3, 6), randn(3, 6)
    lr = 0.9 / torch.linalg.eigvalsh(matrices).max().item()
    iteration = torch.eye(6, dtype=torch.float64) - lr * matrices
    total = sum(torch.linalg.matrix_power(iteration, k) for k in range(terms))
    got = NeumannSeries(max_iter=terms, lr=lr).solve(lambda p: (matrices @ p[..., None])[..., 0], b)
    same([got.value], [lr * (total @ b[..., None])[..., 0]])


def test_two_conjugate_gradient_steps_minimise_over_two_krylov_directions():
    # What an inexact linear solve computes is known too: the projection on span(b, Ab).
    matrices, b = spd(3, 6), randn(3, 6)
    matvec = lambda p: (matrices @ p[..., None])[..., 0]  # noqa: E731
    basis, _ = torch.linalg.qr(torch.stack([b, matvec(b)], dim=2))
    small = torch.linalg.solve(basis.mT @ matrices @ basis, basis.mT @ b[..., None])
    got = ConjugateGradient(max_iter=2).solve(matvec, b)
    same([got.value], [(basis @ small)[..., 0]])


def test_the_proximal_minimum_of_the_oracle_is_where_adapt_ends():
    support, theta = batch(), start()
    phi = adapt(cross_entropy, theta, support, lam=1.0, **EXACT)
    inner = proximal(cross_entropy, theta, 1.0)
    for row, own in zip(tasks(phi), tasks(support), strict=True):
        exact = minimum(lambda phi, own=own: inner(phi, own), theta)
        same(row.values(), [exact[name] for name in row])
