"""Cases of hypertorch: its methods (reverse, fixed point, CG), its logistic regression and iMAML.

Re-created: a regularisation for each parameter, learned as a logarithm; the same hyper-gradient by
unrolling, by fixed-point iterations, by CG and by MINRES; the value of an inexact fixed point after
K terms; iMAML with a learned strength and bias; no proximal term, and one that vanishes. Maps whose
Jacobian is not symmetric, such as equilibrium models, are in test_optimistix_lineax.
"""

import pytest
import torch
from bilevel import proximal, randn, same, tasks, value
from exact import CG, EXACT
from torch import nn

from imaml_ext import MINRES, NeumannSeries, Status, adapt, implicit_meta_grad

FEATURES = 5
ZERO = {"w": torch.zeros(FEATURES, dtype=torch.float64)}


def logistic(params, data):
    x, y = data
    return nn.functional.binary_cross_entropy_with_logits(x @ params["w"], y)


def regularised(params, data):
    penalty = (params["log reg"].exp() * params["w"].square()).sum()
    return logistic(params, data) + 0.5 * penalty


def with_reg(log_reg):
    return lambda phi, data: regularised(phi | {"log reg": log_reg}, data)


def batch(count=3, examples=16):
    x = randn(count, examples, FEATURES)
    return x, ((x @ randn(count, FEATURES, 1))[..., 0] + 0.5 * randn(count, examples) > 0).double()


@pytest.fixture
def setting():
    log_reg = (0.3 * randn(FEATURES) - 1).requires_grad_()
    return batch(), batch(), log_reg


def gradient(setting, *, lam=0.0, linear=CG, **settings):
    support, query, log_reg = setting
    return implicit_meta_grad(
        regularised, ZERO, support, query, lam=lam, inner=EXACT["inner"], linear=linear,
        query_loss=logistic, shared={"log reg": log_reg}, **settings,
    )  # fmt: skip


METHODS = {
    "cg": CG,
    "fixed point": NeumannSeries(max_iter=1000, lr=0.8, rtol=1e-13),
    "minres": MINRES(max_iter=30, rtol=1e-13),
}


@pytest.mark.parametrize("linear", METHODS.values(), ids=METHODS)
def test_every_method_gives_each_regularisation_the_gradient_of_the_minimum(setting, linear):
    support, query, log_reg = setting
    bilevel = value(with_reg(log_reg), logistic, ZERO, support, query)
    out = gradient(setting, linear=linear)
    same([out.shared["log reg"]], torch.autograd.grad(bilevel, log_reg))
    assert (out.linear.status == Status.CONVERGED).all()
    assert not out.params["w"].any()


def test_unrolling_every_step_of_the_descent_gives_the_same_gradient(setting):
    support, query, log_reg = setting
    losses = []
    for own, held_out in zip(tasks(support), tasks(query), strict=True):
        w = ZERO["w"].clone().requires_grad_()
        for _ in range(250):
            loss = with_reg(log_reg)({"w": w}, own)
            w = w - torch.autograd.grad(loss, w, create_graph=True)[0]
        losses.append(logistic({"w": w}, held_out))
    want = torch.autograd.grad(torch.stack(losses).mean(), log_reg)
    same([gradient(setting).shared["log reg"]], want)


@pytest.mark.parametrize("terms", [1, 3, 10])
def test_an_inexact_fixed_point_has_the_value_of_its_terms(setting, terms):
    # x_K = lr (v + (I - lr H) v + ...), and the cross derivative of the penalty is exp(reg) w.
    support, query, log_reg = setting
    lr, total = 0.8, 0
    out = gradient(setting, linear=NeumannSeries(max_iter=terms, lr=lr))
    for w, own, held_out in zip(out.adapted["w"], tasks(support), tasks(query), strict=True):
        hessian = torch.func.hessian(lambda w, own=own: with_reg(log_reg)({"w": w}, own))(w)
        v = torch.func.grad(lambda w, held_out=held_out: logistic({"w": w}, held_out))(w)
        x = torch.zeros_like(v)
        for _ in range(terms):
            x = x - lr * (hessian @ x) + lr * v
        total = total - log_reg.exp() * w * x / 3
    same([out.shared["log reg"]], [total])


@pytest.mark.parametrize("lam", [1e-6, 1e-12, 1e-200])
def test_a_proximal_term_that_vanishes_gives_the_gradient_without_one(setting, lam):
    without, tiny = gradient(setting), gradient(setting, lam=lam)
    error = 1e-8 + 10 * lam
    same([tiny.shared["log reg"]], [without.shared["log reg"]], rtol=error, atol=1e-10 + lam)
    assert tiny.params["w"].abs().max() <= 10 * lam  # lam x
    assert (tiny.linear.status == Status.CONVERGED).all()


def test_without_a_proximal_term_the_start_does_not_matter(setting):
    support, query, log_reg = setting
    start = {"w": randn(FEATURES).requires_grad_()}
    phi = adapt(regularised, start, support, lam=0.0, shared={"log reg": log_reg}, **EXACT)
    torch.func.vmap(logistic)(phi, query).mean().backward()
    assert not start["w"].grad.any()
    same([log_reg.grad], [gradient(setting).shared["log reg"]])


def test_without_a_proximal_term_a_flat_direction_is_reported():
    # Fewer examples than features and no penalty: the minimum is not unique.
    x, y = randn(3, 3, FEATURES), randn(3, 3)
    loss = lambda params, data: params["s"] * (data[0] @ params["w"] - data[1]).square().mean()  # noqa: E731
    out = implicit_meta_grad(
        loss, ZERO, (x, y), batch(), lam=0.0, query_loss=logistic,
        shared={"s": torch.tensor(1.0, dtype=torch.float64)}, **EXACT,
    )  # fmt: skip
    assert (out.linear.status != Status.CONVERGED).all()


def test_without_a_proximal_term_negative_curvature_is_reported():
    data = (torch.zeros(2, 1, dtype=torch.float64),)
    shared = {"s": torch.tensor(1.0, dtype=torch.float64)}
    out = implicit_meta_grad(
        lambda params, _: params["s"] * params["w"].cos().sum(),
        ZERO, data, data, lam=0.0, linear=CG, shared=shared,
        adapted={"w": torch.full((2, FEATURES), 0.3, dtype=torch.float64)},
        query_loss=lambda params, _: (params["w"] - 1).square().sum(),
    )  # fmt: skip
    assert (out.linear.status == Status.NEGATIVE_CURVATURE).all()
    assert "not positive definite" in out.linear.describe()


def test_imaml_learns_the_strength_and_the_bias_of_its_regularisation():
    support, query = batch(), batch()
    log_lam, theta = randn(FEATURES).requires_grad_(), randn(FEATURES).requires_grad_()
    phi = adapt(logistic, {"w": theta}, support, lam={"w": log_lam.exp()}, **EXACT)
    torch.func.vmap(logistic)(phi, query).mean().backward()
    inner = proximal(logistic, {"w": theta}, {"w": log_lam.exp()})
    bilevel = value(inner, logistic, ZERO, support, query)
    same([log_lam.grad, theta.grad], torch.autograd.grad(bilevel, [log_lam, theta]))
