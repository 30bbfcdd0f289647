"""Implicit meta-gradients where a solver or a loss fails, and of bad input."""

import pytest
import torch
from problems import regression

from imaml_ext import (
    ConjugateGradient,
    GradientDescent,
    ProximalStrength,
    Status,
    adapt,
    implicit_meta_grad,
    module_loss,
)


def test_negative_curvature_in_the_first_iteration_gives_the_first_order_gradient(device):
    layout_params = {"w": torch.randn(6, dtype=torch.float64, device=device)}

    def concave(params, data):
        return -50 * (params["w"] ** 2).sum() + 0 * data.sum()

    def query(params, data):
        return (params["w"] * data).sum()

    data = torch.randn(3, 6, dtype=torch.float64, device=device)
    got = implicit_meta_grad(
        concave, layout_params, data, data, lam=2.0, query_loss=query,
        inner=GradientDescent(steps=0), linear=ConjugateGradient(max_iter=5, damping=1.0),
    )  # fmt: skip
    assert (got.linear.status == Status.NEGATIVE_CURVATURE).all()
    torch.testing.assert_close(got.params["w"], data.mean(0))


def test_a_converged_task_whose_loss_is_nan_is_nonfinite(device):
    offset = torch.tensor([0.0, torch.nan, 0.0], dtype=torch.float64, device=device)
    target = torch.randn(3, 4, dtype=torch.float64, device=device)

    def loss(params, data):
        target, offset = data
        return ((params["w"] - target) ** 2).sum() + offset

    got = implicit_meta_grad(
        loss, {"w": torch.zeros(4, dtype=torch.float64, device=device)},
        (target, offset), (target, torch.zeros_like(offset)), lam=1.0,
        inner=GradientDescent(lr=0.1, steps=200, tol=1e-6),
    )  # fmt: skip
    assert got.inner.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert got.failed.tolist() == [False, True, False]


def with_nan(problem, task):
    x, y = (t.clone() for t in problem.support)
    y[task] = torch.nan
    return x, y


def test_a_nonfinite_task_is_reported_and_the_gradient_is_nan(device):
    problem = regression(16, device)
    got = implicit_meta_grad(
        problem.loss, problem.params, with_nan(problem, 3), problem.query, lam=2.0
    )
    assert got.failed.nonzero().flatten().tolist() == [3]
    assert got.inner.status[3] == Status.NONFINITE
    assert all(tensor.isnan().all() for tensor in got.params.values())


def test_a_nonfinite_query_loss_fails_its_task(device):
    problem = regression(4, device)
    x, y = (t.clone() for t in problem.query)
    y[2] = torch.inf
    got = implicit_meta_grad(problem.loss, problem.params, problem.support, (x, y), lam=2.0)
    assert got.failed.tolist() == [False, False, True, False]


def test_omitting_every_task_gives_0(device):
    problem = regression(2, device)
    nothing = tuple(torch.full_like(t, torch.nan) for t in problem.support)
    got = implicit_meta_grad(
        problem.loss, problem.params, nothing, problem.query, lam=2.0, nonfinite="omit"
    )
    assert got.failed.all()
    assert all((t == 0).all() for t in got.params.values())


def test_omitting_a_task_gives_the_mean_over_the_others(device):
    problem = regression(16, device)
    lam = torch.tensor(2.0, dtype=torch.float64, device=device)
    got = implicit_meta_grad(
        problem.loss, problem.params, with_nan(problem, 3), problem.query, lam=lam, nonfinite="omit"
    )
    keep = [task for task in range(16) if task != 3]
    want = implicit_meta_grad(
        problem.loss, problem.params, tuple(t[keep] for t in problem.support),
        tuple(t[keep] for t in problem.query), lam=lam,
    )  # fmt: skip
    for name in problem.params:
        torch.testing.assert_close(got.params[name], want.params[name])
    torch.testing.assert_close(got.lam, want.lam)


def test_adapt_with_a_nonfinite_task_has_a_nan_gradient(device):
    problem = regression(4, device)
    params = {name: t.clone().requires_grad_() for name, t in problem.params.items()}
    phi = adapt(problem.loss, params, with_nan(problem, 1), lam=2.0)
    sum(t[0].sum() for t in phi.values()).backward()
    assert all(t.grad.isnan().all() for t in params.values())


def in_inference_mode():
    with torch.inference_mode():
        return torch.zeros(4, 3, 2)


BAD = [
    (
        {"support": (in_inference_mode(), torch.zeros(4, 3, 1))},
        ValueError,
        r"support \(tensor 0\) was created in inference mode.*pass its clone",
    ),
    (
        {"support": (torch.zeros(4, 3, 2).to_sparse(), torch.zeros(4, 3, 1))},
        TypeError,
        r"support \(tensor 0\) is torch.sparse_coo: pass a dense tensor",
    ),
    ({"loss": torch.nn.functional.mse_loss}, TypeError, "got torch's mse_loss: build it by"),
    ({"loss": torch.nn.Linear(2, 1)}, TypeError, r"loss must be a function of \(params, data\)"),
    ({"support": (torch.zeros(4, 3, 2), torch.zeros(3, 3, 1))}, ValueError, "same leading size B"),
    ({"query": (torch.zeros(3, 5, 2), torch.zeros(3, 5, 1))}, ValueError, "support has 4 tasks"),
    ({"support": (torch.zeros(0, 3, 2), torch.zeros(0, 3, 1))}, ValueError, "is empty: shape"),
    ({"support": (torch.zeros(4, 0, 2), torch.zeros(4, 0, 1))}, ValueError, "is empty: shape"),
    ({"support": (1.0, 2.0)}, TypeError, "must be a tensor, got float"),
    ({"support": ()}, ValueError, "support has no tensors"),
    ({"support": torch.tensor(1.0)}, ValueError, r"must be \[B, ...\], got a 0-d tensor"),
    ({"support": (torch.zeros(4, 3, 2).double(), torch.zeros(4, 3, 1))}, TypeError, "float64"),
    ({"params": {}}, ValueError, "params is empty"),
    ({"params": [torch.zeros(1)]}, TypeError, "params must map names to tensors"),
    ({"params": {"w": torch.zeros(2, dtype=torch.int64)}}, TypeError, "must be float32 or float64"),
    (
        {"params": {"a": torch.zeros(2), "b": torch.zeros(2).double()}},
        ValueError,
        "is torch.float64",
    ),
    ({"lam": ProximalStrength({"w": torch.zeros(3)})}, TypeError, "ProximalStrength: call it to"),
    ({"lam": -1.0}, ValueError, "lam must be positive"),
    ({"lam": float("nan")}, ValueError, "lam must be positive"),
    ({"lam": torch.tensor(-1.0)}, ValueError, "lam must be positive and finite in every entry"),
    ({"lam": torch.tensor(float("nan"))}, ValueError, "lam must be positive and finite in every"),
    ({"lam": torch.ones(3)}, ValueError, "lam has values for 3 tasks, but the batch has 4"),
    ({"lam": torch.ones(4, 2)}, ValueError, r"or \[B, 3\] for B tasks, got shape \[4, 2\]"),
    ({"lam": torch.ones(3, 3)}, ValueError, "dense lam must be finite, symmetric and positive"),
    ({"lam": -torch.eye(3)}, ValueError, "dense lam must be finite, symmetric and positive"),
    ({"lam": torch.eye(3) / 0}, ValueError, "dense lam must be finite, symmetric and positive"),
    (
        {"lam": torch.eye(3) + torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])},
        ValueError,
        "dense lam must be finite, symmetric and positive",
    ),
    ({"lam": {"weight": torch.tensor(1.0)}}, ValueError, "lam must name"),
    (
        {"lam": {"weight": torch.ones(3), "bias": torch.tensor(1.0)}},
        ValueError,
        r"lam\['weight'\] must be 0-d or of shape \[1, 2\]",
    ),
    ({"lam": "2"}, TypeError, "lam must be a float"),
    ({"lam": torch.tensor(2)}, ValueError, "lam is torch.int64"),
    ({"lam": {"weight": 1.0, "bias": 1.0}}, TypeError, r"lam\['weight'\] must be a tensor"),
    (
        {"adapted": {"weight": torch.zeros(4, 1, 2).double(), "bias": torch.zeros(4, 1).double()}},
        ValueError,
        r"adapted\['weight'\] is torch.float64",
    ),
    (
        {"params": {n: t.to("meta") for n, t in torch.nn.Linear(2, 1).named_parameters()}},
        ValueError,
        "is on cpu, the parameters on meta",
    ),
    ({"loss": lambda p, d: p["weight"] * 2}, ValueError, r"must be a scalar, got shape \[1, 2\]"),
    ({"loss": lambda p, d: 1.0}, TypeError, "the loss must return a tensor, got float"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite must be"),
    (
        {"adapted": {"weight": torch.zeros(2, 1, 2), "bias": torch.zeros(2, 1)}},
        ValueError,
        "adapted must have 4 tasks",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_rejected_in_one_line(change, error, message):
    model = torch.nn.Linear(2, 1)
    arguments = {
        "loss": module_loss(model, torch.nn.functional.mse_loss),
        "params": dict(model.named_parameters()),
        "support": (torch.zeros(4, 3, 2), torch.zeros(4, 3, 1)),
        "query": (torch.zeros(4, 5, 2), torch.zeros(4, 5, 1)),
        "lam": 2.0,
    } | change
    with pytest.raises(error, match=message) as caught:
        implicit_meta_grad(**arguments)
    assert "\n" not in str(caught.value)
    if not change.keys() & {"query", "adapted", "nonfinite"}:
        del arguments["query"]
        with pytest.raises(error, match=message):
            adapt(**arguments)
