"""Meta-gradients under autocast are float32, and close to those computed in float32."""

import pytest
import torch
from torch import nn
from torch.func import vmap
from trainings import on_the_device

from imaml_ext import (
    IMAML,
    LBFGS,
    MINRES,
    Adam,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    TaskBatch,
    Trainer,
    adapt,
    implicit_meta_grad,
    module_loss,
)

# Relative; updates stored in half precision would be wrong by more.
TOLERANCE = {torch.bfloat16: 0.08, torch.float16: 0.015}
HALVES = pytest.mark.parametrize("half", TOLERANCE, ids=str)


@pytest.fixture
def problem(device):
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)

    def data():
        return torch.randn(3, 8, 2).to(device), torch.randn(3, 8, 1).to(device)

    return module_loss(model, nn.functional.mse_loss), model, data(), data()


def distance(got, want):
    got, want = (torch.cat([t.flatten() for t in ts]) for ts in (got, want))
    assert got.dtype == torch.float32
    return ((got - want).norm() / want.norm()).item()


SOLVERS = {
    "gradient descent": (GradientDescent(lr=0.05, steps=30), ConjugateGradient()),
    "Adam": (Adam(lr=0.01, steps=30), ConjugateGradient(preconditioner="adam")),
    "L-BFGS": (LBFGS(steps=15), MINRES()),
    "Hessian-free": (HessianFree(steps=5), ConjugateGradient(curvature="ggn")),
}


@HALVES
@pytest.mark.parametrize("name", SOLVERS)
def test_the_meta_gradient_is_close_to_that_of_float32(name, half, problem, device):
    loss, model, support, query = problem
    inner, cg = SOLVERS[name]
    params = dict(model.named_parameters())
    lam = {n: torch.tensor(1.0, device=device) for n in params}
    settings = {"lam": lam, "inner": inner, "linear": cg}
    want = implicit_meta_grad(loss, params, support, query, **settings)
    with torch.autocast(device.type, dtype=half):
        got = implicit_meta_grad(loss, params, support, query, **settings)
    assert 0 < distance(got.params.values(), want.params.values()) < TOLERANCE[half]
    assert distance(got.lam.values(), want.lam.values()) < 2 * TOLERANCE[half]
    assert distance(got.adapted.values(), want.adapted.values()) < TOLERANCE[half]
    assert got.query_loss.dtype == got.support_loss.dtype == torch.float32


@HALVES
def test_a_loss_in_half_precision_is_reported_in_float32(half, device):
    def loss(params, x):
        return (x @ params["w"]).square().mean().to(half)

    x = torch.randn(2, 5, 3, device=device)
    w = {"w": torch.randn(3, 2, device=device)}
    with torch.autocast(device.type, dtype=half):
        out = implicit_meta_grad(loss, w, x, x, lam=1.0)
    assert out.query_loss.dtype == out.support_loss.dtype == torch.float32
    assert out.params["w"].dtype == torch.float32
    want = implicit_meta_grad(lambda p, x: (x @ p["w"]).square().mean(), w, x, x, lam=1.0)
    assert distance([out.params["w"]], [want.params["w"]]) < TOLERANCE[half]


def test_the_gradient_of_a_dense_lam_is_computed_in_float32(problem, device):
    loss, model, support, query = problem
    params = dict(model.named_parameters())
    lam = torch.eye(sum(p.numel() for p in params.values()), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = implicit_meta_grad(loss, params, support, query, lam=lam)
    theta = torch.cat([p.detach().flatten() for p in params.values()])
    phi = torch.cat([t.flatten(1) for t in out.adapted.values()], dim=1)
    outer = out.linear.value.double().T @ (phi - theta).double() / 3
    torch.testing.assert_close(out.lam.double(), -(outer + outer.T) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::imaml_ext.ConvergenceWarning")
@HALVES
def test_the_backward_pass_of_adapt_has_the_autocast_state_of_adapt(half, problem, device):
    loss, model, support, query = problem
    params, inner = dict(model.named_parameters()), GradientDescent(lr=0.05, steps=30)

    def gradient(forward, backward):
        model.zero_grad()
        with torch.autocast(device.type, dtype=half, enabled=forward):
            phi = adapt(loss, params, support, lam=1.0, inner=inner)
            total = vmap(loss)(phi, query).mean()
        # The query loss is already differentiated: only the linear solve is left.
        query_gradients = torch.autograd.grad(total, list(phi.values()))
        with torch.autocast(device.type, dtype=half, enabled=backward):
            torch.autograd.backward(list(phi.values()), list(query_gradients))
        return [p.grad.clone() for p in params.values()]

    want = gradient(False, False)
    outside, inside = gradient(True, False), gradient(True, True)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
    assert 0 < distance(outside, want) < TOLERANCE[half]
    assert all(torch.equal(a, b) for a, b in zip(gradient(False, True), want, strict=True))


@pytest.mark.filterwarnings("ignore::imaml_ext.ConvergenceWarning")
def test_a_grad_scaler_may_scale_the_loss_after_adapt(problem, device):
    loss, model, support, query = problem
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    params, gradients = dict(model.named_parameters()), []
    for scaled in (False, True):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            phi = adapt(loss, params, support, lam=1.0)
            total = vmap(loss)(phi, query).mean()
        if scaled:
            scaler.scale(total).backward()
            scaler.unscale_(optimizer)
        else:
            total.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    # The scale is a power of 2: only numbers below 6e-5 round differently.
    assert distance(gradients[1], gradients[0]) < 2e-3
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, old, gradient in zip(model.parameters(), before, gradients[1], strict=True):
        torch.testing.assert_close(p.detach(), old - gradient)


@HALVES
def test_training_under_autocast_is_close_to_training_in_float32(half, device):
    def train(enabled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)

        class Source:
            def sample(self, step):
                x = torch.randn(4, 10, 2, generator=torch.Generator().manual_seed(step))
                y = x.sum(-1, keepdim=True).sin()
                x, y = x.to(device), y.to(device)
                return TaskBatch((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))

        params = dict(model.named_parameters())
        method = IMAML(
            module_loss(model, nn.functional.mse_loss), params, lam=1.0,
            inner=GradientDescent(lr=0.05, steps=8),
        )  # fmt: skip
        sgd = on_the_device(torch.optim.SGD, params.values(), lr=0.1)
        trainer = Trainer(method, Source(), sgd)
        start = [p.detach().clone() for p in params.values()]
        with torch.autocast(device.type, dtype=half, enabled=enabled):
            for _ in range(10):
                trainer.step()
            trainer.read()
        return [p.detach() - s for p, s in zip(params.values(), start, strict=True)]

    assert 0 < distance(train(True), train(False)) < TOLERANCE[half]
