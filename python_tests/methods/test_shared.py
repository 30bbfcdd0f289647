"""Parameters that are learned but not adapted, against autograd through optima in closed form."""

import pytest
import torch
from torch import nn

from imaml_ext import (
    IMAML,
    ConjugateGradient,
    HessianFree,
    ProximalStrength,
    TaskBatch,
    Trainer,
    adapt,
    implicit_meta_grad,
    module_loss,
)

CG = ConjugateGradient(max_iter=60, rtol=1e-14)
EXACT = {
    "inner": HessianFree(steps=4, linear=CG, damping=0.0),
    "linear": CG,
}  # the loss is quadratic in the head


def anil():
    """A model of which the head is adapted and the body is shared; float64."""
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    params = dict(model.named_parameters())
    head = {name: p for name, p in params.items() if name.startswith("2.")}
    body = {name: p for name, p in params.items() if name.startswith("0.")}

    def data():
        return torch.randn(3, 9, 2).double(), torch.randn(3, 9, 1).double()

    return module_loss(model, nn.functional.mse_loss), head, body, data(), data()


def ridge(head, x, y, theta, lam):
    """The adapted head in closed form: the minimum of mean squared error and proximal term."""
    ones = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    matrix = 2 / len(y) * ones.mT @ ones + lam * torch.eye(ones.shape[-1]).double()
    return torch.linalg.solve(matrix, 2 / len(y) * ones.mT @ y[:, 0] + lam * theta)


def bilevel(head, body, support, query, lam):
    """The mean query loss at the adapted heads, without the library."""
    losses = []
    for x, y, qx, qy in zip(*support, *query, strict=True):
        features, q_features = ((t @ body["0.weight"].T + body["0.bias"]).tanh() for t in (x, qx))
        theta = torch.cat([head["2.weight"][0], head["2.bias"]])
        phi = ridge(head, features, y, theta, lam)
        losses.append((q_features @ phi[:-1] + phi[-1] - qy[:, 0]).square().mean())
    return torch.stack(losses).mean()


def test_a_shared_body_has_the_gradient_of_the_bilevel_objective():
    loss, head, body, support, query = anil()
    lam = torch.tensor(0.7, dtype=torch.float64)
    out = implicit_meta_grad(loss, head, support, query, lam=lam, shared=body, **EXACT)
    want = torch.autograd.grad(
        bilevel(head, body, support, query, lam), [*head.values(), *body.values()]
    )
    got = [*out.params.values(), *out.shared.values()]
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
    assert out.adapted.keys() == head.keys()


def test_adapt_gives_the_shared_body_the_same_gradient():
    loss, head, body, support, query = anil()
    want = torch.autograd.grad(
        bilevel(head, body, support, query, 0.7), [*head.values(), *body.values()]
    )
    phi = adapt(loss, head, support, lam=0.7, shared=body, **EXACT)
    torch.func.vmap(loss)(phi, query).mean().backward()  # the direct part, through the model's body
    for p, exact in zip([*head.values(), *body.values()], want, strict=True):
        torch.testing.assert_close(p.grad, exact, rtol=1e-8, atol=1e-11)


def test_a_hyperparameter_of_the_support_loss_can_be_shared():
    # The query loss does not depend on it: the whole gradient is through phi.
    x, y = torch.randn(4, 20, 6).double(), torch.randn(4, 20).double()
    support, query = (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])
    w = torch.zeros(6, dtype=torch.float64)

    def plain(params, data):
        return (data[0] @ params["w"] - data[1]).square().mean()

    def decayed(params, data):
        return plain(params, data) + params["log decay"].exp() * params["w"].square().sum()

    decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    out = implicit_meta_grad(
        decayed, {"w": w}, support, query, lam=0.1, shared={"log decay": decay},
        query_loss=plain, **EXACT,
    )  # fmt: skip
    total = 0
    for task in range(4):
        a, b = support[0][task], support[1][task]
        matrix = a.T @ a / 5 + (2 * decay.exp() + 0.1) * torch.eye(6).double()
        phi = torch.linalg.solve(matrix, a.T @ b / 5)
        total = total + plain({"w": phi}, (query[0][task], query[1][task])) / 4
    (want,) = torch.autograd.grad(total, decay)
    torch.testing.assert_close(out.shared["log decay"], want, rtol=1e-9, atol=0)


def test_a_nonfinite_task_is_omitted_from_the_shared_gradient():
    loss, head, body, support, query = anil()
    support[1][1] = torch.nan
    settings = {"lam": 0.7, "shared": body, **EXACT}
    propagated = implicit_meta_grad(loss, head, support, query, **settings)
    assert all(t.isnan().all() for t in propagated.shared.values())
    got = implicit_meta_grad(loss, head, support, query, nonfinite="omit", **settings)
    keep = [0, 2]
    want = torch.autograd.grad(
        bilevel(head, body, *(tuple(t[keep] for t in d) for d in (support, query)), 0.7),
        list(body.values()),
    )
    for ours, exact in zip(got.shared.values(), want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
    support[1][:] = torch.nan
    none = implicit_meta_grad(loss, head, support, query, nonfinite="omit", **settings)
    assert all((t == 0).all() for t in none.shared.values())
    phi = adapt(loss, head, support, **settings)
    sum(t.sum() for t in phi.values()).backward()
    assert all(p.grad.isnan().all() for p in body.values())


def test_a_shared_parameter_that_no_loss_uses_has_gradient_0():
    loss, head, body, support, query = anil()
    unused = torch.zeros(3, dtype=torch.float64)

    def ignoring(params, data):
        return loss({name: params[name] for name in [*head, *body]}, data)

    out = implicit_meta_grad(
        ignoring, head, support, query, lam=0.7, shared=body | {"unused": unused}, **EXACT
    )
    assert (out.shared["unused"] == 0).all()
    assert (out.shared["0.weight"] != 0).all()


def test_imaml_trains_body_head_and_lam_together():
    loss, head, body, support, query = anil()
    strength = ProximalStrength(head, 0.7, form="tensor")
    method = IMAML(loss, head, lam=strength, shared=body, **EXACT)
    assert list(method.learned()) == [*head, *body, "lam.log.0", "lam.log.1"]

    class Source:
        def sample(self, step):
            return TaskBatch(support, query)

    optimizer = torch.optim.SGD(
        [{"params": head.values()}, {"params": body.values(), "lr": 0.3},
         {"params": strength.parameters(), "lr": 0.0}],
        lr=0.1,
    )  # fmt: skip
    before = {name: t.detach().clone() for name, t in method.learned().items()}
    want = torch.autograd.grad(
        bilevel(head, body, support, query, 0.7), [*head.values(), *body.values()]
    )
    trainer = Trainer(method, Source(), optimizer)
    trainer.step()
    rates = {**dict.fromkeys(head, 0.1), **dict.fromkeys(body, 0.3)}
    for (name, rate), gradient in zip(rates.items(), want, strict=True):
        moved = before[name] - rate * gradient
        torch.testing.assert_close(method.learned()[name], moved, rtol=1e-8, atol=1e-11)
    assert all(t.grad.abs() > 0 for t in strength.parameters())
    assert torch.equal(strength.log[0], before["lam.log.0"])
    first = trainer.history[0]["loss"]
    for _ in range(20):
        trainer.step()
    assert trainer.history[-1]["loss"] < 0.8 * first


def test_imaml_adapts_with_the_current_body():
    loss, head, body, support, _ = anil()
    method = IMAML(loss, head, lam=0.7, shared=body, **EXACT)
    with torch.no_grad():
        body["0.weight"].mul_(2.0)
    theta = torch.cat([head["2.weight"][0], head["2.bias"]]).detach()
    features = (support[0][0] @ body["0.weight"].T + body["0.bias"]).tanh().detach()
    want = ridge(head, features, support[1][0], theta, 0.7)
    phi = method.adapt(support)
    torch.testing.assert_close(torch.cat([phi["2.weight"][0, 0], phi["2.bias"][0]]), want)


BAD = [
    (
        {"2.weight": torch.zeros(1, 5).double()},
        ValueError,
        r"shared\['2.weight'\] is also in params",
    ),
    ({"0.bias": torch.zeros(5)}, ValueError, "shared is torch.float32 on cpu, but params are"),
    ({"0.bias": 1.0}, TypeError, "shared must map names to tensors"),
    ([torch.zeros(5)], TypeError, "shared must map names to tensors"),
]


@pytest.mark.parametrize(("shared", "error", "message"), BAD)
def test_invalid_shared_parameters_are_rejected_in_one_line(shared, error, message):
    loss, head, _, support, query = anil()
    for call in (
        lambda: implicit_meta_grad(loss, head, support, query, lam=1.0, shared=shared),
        lambda: adapt(loss, head, support, lam=1.0, shared=shared),
        lambda: IMAML(loss, head, shared=shared),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_shared_tensor_with_values_for_each_task_is_referred_to_the_data():
    def loss(params, data):
        return (params["w"] - data).square().sum() * params["log_decays"].exp()

    data, shared = torch.ones(3, 2), {"log_decays": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"shape \[3\] of shared\['log_decays'\].* the data"):
        implicit_meta_grad(loss, {"w": torch.zeros(2)}, data, data, lam=1.0, shared=shared)


def test_learned_tensors_must_be_distinct_and_require_grad():
    loss, head, body, _, _ = anil()
    with pytest.raises(ValueError, match=r"shared\['0.weight'\] does not require grad"):
        IMAML(loss, head, shared={name: t.detach() for name, t in body.items()})
    lam = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="lam contains the same tensor under two names"):
        IMAML(loss, head, lam=dict.fromkeys(head, lam))
    IMAML(loss, head, lam=dict.fromkeys(head, lam.detach()))  # not learned
