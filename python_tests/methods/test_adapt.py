"""What `adapt` differentiates by, and how often, against closed forms and plain autograd."""

import pytest
import torch
from ridge_problems import CG, EXACT, LAM, assert_same_gradients, data, fit, learned, randn, ridge
from torch import nn
from torch.func import vmap

from imaml_ext import (
    FOMAML,
    IMAML,
    MAML,
    MINRES,
    NeumannSeries,
    TaskBatch,
    adapt,
    implicit_meta_grad,
)


def test_features_of_a_body_carry_the_gradient_to_the_body():
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
    theta, (x, y), (qx, qy) = learned(5), data(), data()
    phi = adapt(fit, theta, (body(x), y), lam=LAM, **EXACT)
    value = vmap(fit)(phi, (body(qx), qy)).mean()
    exact = sum(
        (body(c) @ ridge(body(a), b, theta["w"]) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, qx, qy, strict=True)
    )
    assert_same_gradients(value, exact, [theta["w"], *body.parameters()])


def test_inputs_and_labels_may_be_learned():
    theta, (x, y), query = {"w": randn(4)}, data(), data()
    x.requires_grad_()
    y.requires_grad_()
    phi = adapt(lambda p, d: fit(p, (d["x"], d["y"])), theta, {"x": x, "y": y}, lam=LAM, **EXACT)
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(a, b, theta["w"]) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    assert_same_gradients(value, exact, [x, y])


def test_weights_of_examples_may_come_from_a_network():
    network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()).double()
    theta, (x, y), query = learned(), data(), data()
    weight = network(y[..., None].abs())[..., 0]

    def weighted(p, d):
        x, y, w = d
        return (w * (x @ p["w"] - y).square()).mean()

    phi = adapt(weighted, theta, (x, y, weight), lam=LAM, **EXACT)
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(a, b, theta["w"], weight=w) - d).square().mean() / 3
        for a, b, w, c, d in zip(x, y, weight, *query, strict=True)
    )
    assert_same_gradients(value, exact, [theta["w"], *network.parameters()])


def test_one_tensor_may_enter_through_the_data_and_through_shared():
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (x, y), query = data(), data()

    def loss(p, d):
        return fit(p, d) + p["scale"] * p["w"].square().sum()

    phi = adapt(
        loss, {"w": randn(4) * 0}, (scale * x, y), lam=LAM, shared={"scale": scale}, **EXACT
    )
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(scale * a, b, torch.zeros(4).double(), LAM + 2 * scale) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    assert_same_gradients(value, exact, [scale])


def test_only_the_rows_of_a_failed_task_are_nan_in_the_gradient_by_the_data():
    (x, y), theta = data(), learned()
    y[1, 0] = torch.nan
    x.requires_grad_()
    phi = adapt(fit, theta, (x, y), lam=LAM, **EXACT)
    phi["w"].sum().backward()
    assert theta["w"].grad.isnan().all()
    assert x.grad[1].isnan().all()
    assert x.grad[[0, 2]].isfinite().all()
    exact = sum(ridge(x[k], y[k], theta["w"]).sum() for k in (0, 2))
    (want,) = torch.autograd.grad(exact, x)
    torch.testing.assert_close(x.grad[[0, 2]], want[[0, 2]], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["support", "query"])
@pytest.mark.parametrize("form", ["implicit_meta_grad", IMAML, MAML, FOMAML])
def test_data_with_a_graph_are_rejected_where_numbers_are_returned(form, name):
    batch = {"support": data(), "query": data()}
    batch[name][0].requires_grad_()
    call = {
        "implicit_meta_grad": lambda: implicit_meta_grad(fit, learned(), **batch, lam=LAM),
    }.get(form, lambda: form(fit, learned()).meta_gradient(TaskBatch(**batch)))
    with pytest.raises(ValueError, match=rf"{name} \(tensor 0\) requires grad, but only adapt"):
        call()


def test_evaluation_accepts_data_with_a_graph():
    support = data()
    support[0].requires_grad_()
    phi = IMAML(fit, learned()).adapt(support)
    assert not phi["w"].requires_grad


# Second derivatives, and several vectors at once.


def norm_of_ridge(lam, x, y):
    return ridge(x[0], y[0], torch.zeros(4).double(), lam).square().sum()


def norm_of_adapted(lam, x, y):
    theta = {"w": torch.zeros(4).double()}
    return adapt(fit, theta, (x[:1], y[:1]), lam=lam, **EXACT)["w"].square().sum()


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, at: torch.autograd.grad(f(at), at, create_graph=True),
        lambda f, at: f(at).backward(create_graph=True),
        lambda f, at: torch.autograd.functional.hessian(f, at),
        lambda f, at: torch.autograd.functional.hessian(f, at, vectorize=True),
        lambda f, at: torch.autograd.functional.jacobian(f, at, create_graph=True),
        lambda f, at: torch.autograd.functional.hvp(f, at, torch.ones_like(at)),
    ],
    ids=["grad", "backward", "hessian", "vectorised hessian", "jacobian", "hvp"],
)
def test_second_derivatives_are_rejected_on_every_route(differentiate):
    x, y = data()
    at = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="adapt can be differentiated only once") as caught:
        differentiate(lambda lam: norm_of_adapted(lam.exp(), x, y), at)
    assert "\n" not in str(caught.value)


def test_a_jacobian_may_be_computed_for_several_vectors_at_once():
    x, y = data()
    theta = randn(4)

    def ours(theta, x):
        return adapt(fit, {"w": theta}, (x, y), lam=LAM, **EXACT)["w"]

    def exact(theta, x):
        return torch.stack([ridge(a, b, theta) for a, b in zip(x, y, strict=True)])

    want = torch.autograd.functional.jacobian(exact, (theta, x))
    for vectorize in (False, True):
        got = torch.autograd.functional.jacobian(ours, (theta, x), vectorize=vectorize)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    leaf = theta.requires_grad_()
    rows = ours(leaf, x)[1]
    (got,) = torch.autograd.grad(rows, leaf, torch.eye(4).double(), is_grads_batched=True)
    torch.testing.assert_close(got, want[0][1], rtol=1e-8, atol=1e-11)


# Without a proximal term.


def test_without_a_proximal_term_theta_is_the_start_and_has_gradient_0():
    x, y = randn(3, 9, 4), randn(3, 9)
    query = data()
    decay = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    theta = learned()

    def loss(p, d):
        return fit(p, d) + p["decay"] / 2 * p["w"].square().sum()

    settings = {"lam": 0, "shared": {"decay": decay}, **EXACT}
    phi = adapt(loss, theta, (x, y), **settings)
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(a, b, torch.zeros(4).double(), decay) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    assert_same_gradients(value, exact, [decay])
    out = implicit_meta_grad(loss, theta, (x, y), query, query_loss=fit, **settings)
    assert (out.params["w"] == 0).all()
    assert out.lam is None
    (want,) = torch.autograd.grad(exact, decay)
    torch.testing.assert_close(out.shared["decay"], want, rtol=1e-8, atol=1e-11)
    assert (out.linear.lanczos.smallest > 0.19).all()
    with torch.no_grad():
        other = adapt(loss, {"w": theta["w"] + 1}, (x, y), **settings)
    torch.testing.assert_close(other["w"], phi["w"].detach())


def test_the_gradient_by_a_lam_of_0_is_the_one_sided_derivative():
    (x, y), query = data(), data()
    lam = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    theta = learned()
    phi = adapt(fit, theta, (x, y), lam=lam, **EXACT)
    exact = sum(
        (c @ ridge(a, b, theta["w"], lam) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    (got,) = torch.autograd.grad(vmap(fit)(phi, query).mean(), lam)
    (want,) = torch.autograd.grad(exact, lam)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize("linear", [CG, NeumannSeries(max_iter=9), MINRES(max_iter=9)])
def test_a_hessian_that_is_not_positive_definite_is_reported_without_a_proximal_term(linear):
    def saddle(p, d):
        return (torch.tensor([1.0, -1.0]).double() * p["w"].square()).sum() * d.mean()

    ones, at = torch.ones(2, 1).double(), {"w": torch.zeros(2, 2).double()}
    theta = {"w": torch.zeros(2).double()}
    out = implicit_meta_grad(
        saddle, theta, ones, ones, lam=0, linear=linear, adapted=at,
        query_loss=lambda p, d: p["w"][1] * d.mean(),
    )  # fmt: skip
    if not isinstance(linear, MINRES):
        assert "NEGATIVE_CURVATURE: 2 of 2 tasks" in out.linear.describe()
    if out.linear.lanczos is not None:
        assert (out.linear.error_estimate == torch.inf).all()


def test_imaml_without_a_proximal_term_needs_something_to_learn():
    with pytest.raises(ValueError, match="with lam=0 theta has no gradient"):
        IMAML(fit, learned(), lam=0)


# Negative curvature at once.


@pytest.mark.parametrize("lam", [0.1, 1e-4, 1e-12])
@pytest.mark.parametrize("linear", [CG, NeumannSeries(max_iter=9)])
def test_at_negative_curvature_the_gradients_are_those_of_first_order_methods(lam, linear):
    # Concave at 0.3. First-order methods take phi - theta as a constant.
    at, scale = torch.tensor([[0.3]]).double(), torch.tensor(1.0).double()
    strength = torch.tensor(lam).double()

    def concave(p, d):
        return torch.cos(p["x"]).sum() * p["s"] + 0 * d.sum()

    def query_loss(p, d):
        return (p["x"] - 1).square().sum() + 3 * p["s"] + 0 * d.sum()

    zero = torch.zeros(1, 1).double()
    out = implicit_meta_grad(
        concave, {"x": torch.tensor([0.2]).double()}, zero, zero, lam=strength, linear=linear,
        adapted={"x": at}, query_loss=query_loss, shared={"s": scale},
    )  # fmt: skip
    assert "NEGATIVE_CURVATURE" in out.linear.describe()
    torch.testing.assert_close(out.params["x"], 2 * (at[0] - 1))
    torch.testing.assert_close(out.shared["s"], torch.tensor(3.0).double())
    assert out.lam == 0
