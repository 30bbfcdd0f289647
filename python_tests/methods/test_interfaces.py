"""Meta-gradients in user code: training loops, optimizers, torch.func and torch.compile.

The oracle of the loops is the bilevel objective in closed form, differentiated by autograd.
"""

import pytest
import torch
from problems import Problem
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from imaml_ext import (
    FOMAML,
    IMAML,
    MAML,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    TaskBatch,
    adapt,
    implicit_meta_grad,
    module_loss,
)
from imaml_ext.problem.layout import Layout

LAM = 0.7
CG = ConjugateGradient(max_iter=40, rtol=1e-14)
EXACT = {"inner": HessianFree(steps=8, linear=CG, damping=0.0), "linear": CG}


def data(tasks=3, examples=9):
    x = torch.randn(tasks, examples, 2, dtype=torch.float64)
    return x, torch.randn(tasks, examples, 1, dtype=torch.float64)


def bilevel(model, support, query):
    """The mean query loss of a linear model adapted exactly, in the graph of its parameters."""
    theta = torch.cat([model.weight[0], model.bias])
    losses = []
    for x, y, qx, qy in zip(*support, *query, strict=True):
        x, qx = (torch.cat([t, torch.ones_like(t[:, :1])], dim=1) for t in (x, qx))
        matrix = 2 / len(y) * x.T @ x + LAM * torch.eye(3).double()
        phi = torch.linalg.solve(matrix, 2 / len(y) * x.T @ y[:, 0] + LAM * theta)
        losses.append((qx @ phi - qy[:, 0]).square().mean())
    return torch.stack(losses).mean()


# Three ways to add the gradient of the mean query loss to .grad, and to return the loss.


def fill_exactly(model, support, query):
    loss = bilevel(model, support, query)
    loss.backward()
    return loss.detach()


def fill_from_implicit_meta_grad(model, support, query):
    params = dict(model.named_parameters())
    loss = module_loss(model, nn.functional.mse_loss)
    out = implicit_meta_grad(loss, params, support, query, lam=LAM, **EXACT)
    for name, p in params.items():
        p.grad = out.params[name] if p.grad is None else p.grad + out.params[name]
    return out.query_loss.mean()


def fill_through_adapt(model, support, query):
    loss = module_loss(model, nn.functional.mse_loss)
    phi = adapt(loss, dict(model.named_parameters()), support, lam=LAM, **EXACT)
    total = vmap(loss)(phi, query).mean()
    total.backward()
    return total.detach()


OURS = [fill_from_implicit_meta_grad, fill_through_adapt]


def groups(model, **of_bias):
    return [{"params": [model.weight]}, {"params": [model.bias], **of_bias}]


OPTIMIZERS = {
    "SGD in groups": lambda m: torch.optim.SGD(
        groups(m, lr=0.3, weight_decay=0.0), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05
    ),
    "Adam, foreach": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, foreach=True),
    "AdamW, fused, in groups": lambda m: torch.optim.AdamW(
        groups(m, lr=0.02, weight_decay=0.3), lr=0.1, fused=True
    ),
    "L-BFGS": lambda m: torch.optim.LBFGS(
        m.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
    ),
}


def train(fill, make_optimizer):
    """A training loop with a closure, two batches per step, clipping and a schedule."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for _ in range(5):
        batches = [(data(), data()), (data(), data())]

        def closure(batches=batches):
            optimizer.zero_grad()
            loss = sum(fill(model, *batch) for batch in batches)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        optimizer.step(closure)
        scheduler.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "name", [*list(OPTIMIZERS)[:-1], pytest.param("L-BFGS", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("fill", OURS)
def test_a_training_loop_agrees_with_one_on_the_exact_bilevel_objective(fill, name):
    got, want = train(fill, OPTIMIZERS[name]), train(fill_exactly, OPTIMIZERS[name])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in nn.Linear(2, 1).double().parameters()])
    assert (want - start).norm() > 0.05


def network():
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def differential_equation(model, second_derivative):
    """The loss of a PINN for u'' + u = f on collocation points and u(0) = 0."""

    def loss(params, data):
        x, f = data

        def u(t):
            return functional_call(model, params, (t[None],))[0]

        curvature = vmap(lambda t: second_derivative(u, t))(x[:, 0])
        values = vmap(u)(x[:, 0])
        return (curvature + values - f[:, 0]).square().mean() + u(
            torch.zeros_like(x[0, 0])
        ).square()

    return loss


def by_jvp(u, t):
    one = torch.ones_like(t)
    return jvp(lambda t: jvp(u, (t,), (one,))[1], (t,), (one,))[1]


SECOND = {"grad": lambda u, t: grad(grad(u))(t), "hessian": lambda u, t: hessian(u)(t),
          "jacrev": lambda u, t: jacrev(jacrev(u))(t), "jvp": by_jvp}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_a_loss_may_use_derivatives_of_the_model(name):
    loss = differential_equation(network(), SECOND[name])
    params = {n: p.detach() for n, p in network().named_parameters()}
    support, query = ((data()[0][..., :1], data()[1]) for _ in range(2))
    got = implicit_meta_grad(
        loss, params, support, query, lam=2.0, inner=GradientDescent(lr=0.01, steps=30), linear=CG
    )
    # In the oracle u = b + sum_k c_k tanh(w_k t + a_k) is differentiated by hand.
    problem = Problem(differentiated_by_hand, params, support, query, Layout(params))
    phi = problem.layout.flatten(got.adapted)
    x = torch.linalg.solve(
        problem.hessians(phi) + 2.0 * torch.eye(16).double(), problem.query_gradients(phi)
    )
    want = problem.layout.unflatten(2.0 * x.mean(0))
    for key in params:
        torch.testing.assert_close(got.params[key], want[key], rtol=1e-8, atol=1e-10)
    assert got.linear.residual.max() < 1e-10


def differentiated_by_hand(params, data):
    x, f = data
    w, a, c, b = params["0.weight"][:, 0], params["0.bias"], params["2.weight"][0], params["2.bias"]
    h = (x * w + a).tanh()
    values = h @ c + b
    curvature = (-2 * h * (1 - h * h) * w * w) @ c
    return (curvature + values - f[:, 0]).square().mean() + (a.tanh() @ c + b).square().sum()


def test_the_query_loss_may_use_torch_func():
    # The query loss includes the gradient norm of the support loss at phi.
    model = nn.Linear(2, 1).double()
    loss, params = module_loss(model, nn.functional.mse_loss), dict(model.named_parameters())
    support, query = data(), data()

    def outer(phi, support, query):
        gradient = grad(loss)(phi, support)
        return loss(phi, query) + gradient["weight"].square().sum()

    phi = adapt(loss, params, support, lam=LAM, **EXACT)
    vmap(outer)(phi, support, query).mean().backward()
    total = 0
    for x, y, qx, qy in zip(*support, *query, strict=True):
        ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        theta = torch.cat([model.weight[0], model.bias])
        matrix = 2 / 9 * ones.T @ ones + LAM * torch.eye(3).double()
        best = torch.linalg.solve(matrix, 2 / 9 * ones.T @ y[:, 0] + LAM * theta)
        gradient = 2 / 9 * ones.T @ (ones @ best - y[:, 0])
        fit = (qx @ best[:2] + best[2] - qy[:, 0]).square().mean()
        total = total + (fit + gradient[:2].square().sum()) / 3
    want = torch.autograd.grad(total, list(model.parameters()))
    for p, exact in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, exact, rtol=1e-8, atol=1e-11)


LINEAR = nn.Linear(2, 1).double()
LOSS = module_loss(LINEAR, nn.functional.mse_loss)
CALLS = {
    "implicit_meta_grad": lambda p, s: implicit_meta_grad(LOSS, p, s, s, lam=1.0).query_loss.sum(),
    "adapt": lambda p, s: adapt(LOSS, p, s, lam=1.0)["bias"].sum(),
    "IMAML": lambda p, s: IMAML(LOSS, learned()).meta_gradient(TaskBatch(s, s)).params["bias"],
    "IMAML.adapt": lambda p, s: IMAML(LOSS, learned()).adapt(s)["bias"].sum(),
    "MAML": lambda p, s: MAML(LOSS, learned()).meta_gradient(TaskBatch(s, s)).params["bias"],
    "FOMAML": lambda p, s: FOMAML(LOSS, learned()).meta_gradient(TaskBatch(s, s)).params["bias"],
}


def learned():
    return dict(LINEAR.named_parameters())


def _dual(call, params, support):
    with forward_ad.dual_level():
        ones = {n: forward_ad.make_dual(t, torch.ones_like(t)) for n, t in params.items()}
        return call(ones, support)


AROUND = {
    "vmap over batches": lambda f, p, s: vmap(lambda k: f(p, tuple(k * t for t in s)))(
        torch.ones(2).double()
    ),
    "vmap over something else": lambda f, p, s: vmap(lambda k: k * f(p, s))(torch.ones(2).double()),
    "grad": lambda f, p, s: grad(lambda p: f(p, s).sum())(p),
    "jacrev": lambda f, p, s: jacrev(lambda p: f(p, s))(p),
    "jvp": lambda f, p, s: jvp(lambda p: f(p, s), (p,), (p,)),
    "forward_ad": _dual,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_inside_a_transform_is_rejected(call, around):
    params = {name: p.detach() for name, p in LINEAR.named_parameters()}
    CALLS[call](params, data())
    with pytest.raises(RuntimeError, match="cannot run inside vmap, grad, jvp") as caught:
        AROUND[around](CALLS[call], params, data())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
@pytest.mark.parametrize("fill", OURS)
def test_torch_compile_compiles_the_code_around_a_meta_gradient(fill):
    torch.manual_seed(0)
    model, support, query = nn.Linear(2, 1).double(), data(), data()
    want = torch.autograd.grad(bilevel(model, support, query), list(model.parameters()))
    compiled = torch.compile(lambda s, q: 3.0 * fill(model, s, q), backend="aot_eager")
    loss = compiled(support, query)
    torch.testing.assert_close(loss, 3.0 * bilevel(model, support, query).detach())
    for p, exact in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("call", ["implicit_meta_grad", "adapt"])
def test_a_full_graph_compilation_is_rejected_with_a_remedy(call):
    compiled = torch.compile(CALLS[call], backend="aot_eager", fullgraph=True)
    params = {name: p.detach() for name, p in LINEAR.named_parameters()}
    with pytest.raises(RuntimeError, match="use RecordedMetaGradient to compile a meta-gradient"):
        compiled(params, data())
