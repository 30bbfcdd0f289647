"""Errors of layers that PyTorch cannot vmap or differentiate twice, and the remedies in them."""

import pytest
import torch
from awkward_layers import (
    Attention,
    Bag,
    Deciding,
    Distances,
    Generated,
    Last,
    Own,
    OwnFunction,
    Unbatched,
    encoder,
)
from problems import Problem
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imaml_ext import (
    FOMAML,
    MAML,
    ConjugateGradient,
    GradientDescent,
    Reptile,
    TaskBatch,
    adapt,
    implicit_meta_grad,
    module_loss,
)
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.unsupported import unsupported_layer_message

SETTINGS = {
    "lam": 5.0,
    "inner": GradientDescent(lr=0.02, steps=3),
    "linear": ConjugateGradient(max_iter=200, rtol=1e-13),
}


def sequences():
    return torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 1).double()


def meta_gradient(layer, method=None, **settings):
    model = Last(layer, **settings).double()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    support, query = sequences(), sequences()
    if method is not None:
        inner = SETTINGS["inner"]
        return method(loss, params, inner=inner).meta_gradient(TaskBatch(support, query))
    return implicit_meta_grad(loss, params, support, query, **SETTINGS)


TWICE = {
    "EmbeddingBag": (lambda: Bag(True), "embedding_bag.*use nn.Embedding, and the sum"),
    "cdist": (Distances, "cdist.*use_mm_for_euclid_dist"),
    "Function": (lambda: Own(OwnFunction), "OwnFunction.*use operators that PyTorch differ"),
    "generated": (lambda: Own(Generated), "Generated.*use operators that PyTorch differentiates"),
}
FIRST_ORDER = {"FOMAML": FOMAML, "Reptile": Reptile}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", TWICE)
def test_an_operator_without_a_second_derivative_is_reported_with_a_remedy(name, curvature):
    make, remedy = TWICE[name]
    message = rf"^the loss has no second derivative in PyTorch \(.*{remedy}"
    model = Last(make()).double()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    settings = SETTINGS | {"linear": ConjugateGradient(curvature=curvature)}
    mode = model.inside["layer"].training
    with pytest.raises(RuntimeError, match=message) as caught:
        implicit_meta_grad(loss, params, sequences(), sequences(), **settings)
    assert str(caught.value).endswith("or use a first-order method, FOMAML or Reptile")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert model.inside["layer"].training == mode
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match=message):
        meta_gradient(make(), MAML)
    phi = adapt(loss, params, sequences(), **settings)
    with pytest.raises(RuntimeError, match=message):
        sum(t.square().sum() for t in phi.values()).backward()


@pytest.mark.parametrize("method", FIRST_ORDER)
@pytest.mark.parametrize("name", TWICE)
def test_first_order_methods_need_no_second_derivative(name, method):
    got = meta_gradient(TWICE[name][0](), FIRST_ORDER[method])
    assert all(t.isfinite().all() for t in got.params.values())
    assert any((t != 0).any() for t in got.params.values())


def test_a_layer_that_cannot_be_vmapped_is_named_with_a_remedy():
    message = r"^inside.layer \(Own\) cannot be vmapped by PyTorch: use operators that PyTorch can"
    for method in (None, FOMAML):
        with pytest.raises(RuntimeError, match=message) as caught:
            meta_gradient(Own(Unbatched), method)
        assert "\n" not in str(caught.value)


def test_a_layer_with_data_dependent_control_flow_is_named():
    message = r"^inside.layer \(Deciding\) depends on the value of a tensor.*torch.where"
    with pytest.raises(RuntimeError, match=message):
        meta_gradient(Deciding())


def test_a_module_called_by_a_plain_function_is_named():
    model = Last(Own(Unbatched)).double()

    def loss(params, data):
        return F.mse_loss(torch.func.functional_call(model, params, (data[0],)), data[1])

    with pytest.raises(RuntimeError, match=r"^inside.layer \(Own\) cannot be vmapped"):
        implicit_meta_grad(loss, dict(model.named_parameters()), sequences(), sequences(), lam=1.0)


def test_an_operator_of_the_criterion_is_reported_too():
    def ctc(outputs, y):
        log_probabilities = outputs.log_softmax(-1).transpose(0, 1)
        lengths = [torch.full((5,), 3), torch.full((5,), 2)]
        return F.ctc_loss(log_probabilities, torch.ones(5, 2, dtype=torch.long), *lengths)

    model = nn.Linear(4, 6).double()
    arguments = module_loss(model, ctc), dict(model.named_parameters()), sequences(), sequences()
    with pytest.raises(RuntimeError, match=r"^the loss has no second .*_ctc_loss_backward"):
        implicit_meta_grad(*arguments, lam=1.0)


class Applied(nn.Module):
    """A function of a linear layer and x [N, 3, 4]."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear, x)


def written_to(out, h):
    out[:] = h
    return out


def hooked(linear, x):
    h = linear(x)
    h.register_hook(lambda g: 2 * g)
    return h


def gaussian(x, **settings):
    return MultivariateNormal(x[0, 0], covariance_matrix=x[0, 0].exp().diag(), **settings)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


VALUE = r"depends on the value of a tensor, .*: keep it a tensor, without item\(\)"
SHAPE = r"selects elements by value, so that shapes would differ .*: .*\(losses \* mask\).sum"
SHARED = r"writes to a tensor that all tasks share.*x.new_zeros\(...\)"
CHECKPOINT = r"runs under activation checkpointing, .*: call the block itself"
AUTOGRAD = r"calls autograd.grad, backward or requires_grad_, .*: use torch.func.grad"
KINDS = {
    "requires_grad_": (AUTOGRAD, lambda linear, x: linear(x.detach().requires_grad_())),
    "autograd.grad": (AUTOGRAD, lambda linear, x: torch.autograd.grad(linear(x).sum(), x)[0]),
    "backward": (AUTOGRAD, lambda linear, x: linear(x).sum().backward()),
    "item": (VALUE, lambda linear, x: linear(x) * x.mean().item()),
    "float": (VALUE, lambda linear, x: linear(x) * float(x.mean())),
    "tolist": (VALUE, lambda linear, x: linear(x) * x.tolist()[0][0][0]),
    "numpy": (VALUE, lambda linear, x: linear(x) * x.numpy().mean()),
    "if": (VALUE, lambda linear, x: linear(x) if x.sum() > 0 else -linear(x)),
    "range": (VALUE, lambda linear, x: sum(linear(x) for _ in range((x[0, 0, 0] > 9).long() + 1))),
    "mask": (SHAPE, lambda linear, x: linear(x)[x[:, 0, 0] > 0]),
    "masked_select": (SHAPE, lambda linear, x: linear(x).masked_select(x > 0)),
    "nonzero": (SHAPE, lambda linear, x: linear(x)[(x[:, 0, 0] > 0).nonzero()[:, 0]]),
    "where": (SHAPE, lambda linear, x: linear(x)[torch.where(x[:, 0, 0] > 0)]),
    "unique": (SHAPE, lambda linear, x: linear(x) + x.unique().mean()),
    "out[:]": (SHARED, lambda linear, x: written_to(zeros(5, 3, 4), linear(x))),
    "copy_": (SHARED, lambda linear, x: zeros(5, 3, 4).copy_(linear(x))),
    "add_": (SHARED, lambda linear, x: zeros(5, 3, 4).add_(linear(x))),
    "index_add_": (
        SHARED,
        lambda linear, x: zeros(5, 3, 4).index_add_(0, torch.arange(5), linear(x)),
    ),
    "reentrant": (CHECKPOINT, lambda linear, x: checkpoint(linear, x, use_reentrant=True)),
    "not reentrant": (CHECKPOINT, lambda linear, x: checkpoint(linear, x, use_reentrant=False)),
    "normal_": (
        r"draws random numbers into a tensor that .*: use torch.randn or rand",
        lambda linear, x: linear(x) + zeros(3, 1).normal_(),
    ),
    "hook": (r"registers a hook on a tensor, .*generate_vmap_rule=True", hooked),
    "rrelu": (
        r"cannot be vmapped by PyTorch \(aten::rrelu\)",
        lambda linear, x: F.rrelu(linear(x), training=True),
    ),
    "covariance": (
        r"creates a distribution that checks .*: pass validate_args=False",
        lambda linear, x: linear(x) + gaussian(x, validate_args=True).mean,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_vmap_cannot_do_is_named_in_one_line_with_a_remedy(kind):
    message, function = KINDS[kind]
    with pytest.raises(
        RuntimeError, match=rf"^(inside.layer \(Applied\)|Linear) {message}"
    ) as caught:
        meta_gradient(Applied(function))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


REMEDIED = {
    "new_zeros": lambda linear, x: written_to(x.new_zeros(x.shape), linear(x)),
    "zeros_like": lambda linear, x: written_to(torch.zeros_like(x), linear(x)),
    "empty": lambda linear, x: written_to(torch.empty(x.shape, dtype=x.dtype), linear(x)),
    "masked mean": lambda linear, x: (linear(x) * (x > 0)).sum((0, 1)) / (x > 0).sum((0, 1)),
    "validated": lambda linear, x: linear(x) + gaussian(x, validate_args=False).mean,
}


@pytest.mark.parametrize("name", REMEDIED)
def test_the_remedy_for_what_vmap_cannot_do_works(name):
    model = Applied(REMEDIED[name]).double()
    x, y = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 3, 4).double()
    loss = module_loss(model, lambda z, y: (z - y).square().mean())
    got = implicit_meta_grad(loss, dict(model.named_parameters()), (x, y), (x, y), lam=1.0)
    for task in range(2):
        phi = {n: t[task] for n, t in got.adapted.items()}
        h = x[task] @ phi["linear.weight"].T + phi["linear.bias"]
        if name == "masked mean":
            h = torch.stack([h[..., k][x[task, ..., k] > 0].mean() for k in range(4)])
        elif name == "validated":
            h = h + x[task, 0, 0]
        torch.testing.assert_close(got.query_loss[task], (h - y[task]).square().mean())


def test_other_errors_keep_their_text():
    message = r"^inside.layer \(Linear\): Expected size for first two dimensions of batch2.* \(in "
    with pytest.raises(RuntimeError, match=message):
        meta_gradient(nn.Linear(7, 4))
    assert unsupported_layer_message(RuntimeError("out of memory")) is None


def assert_equals_a_dense_solve(got, model, params, support, query):
    """With the Hessian of torch.func at the same phi."""
    problem = Problem(module_loss(model, F.mse_loss), params, support, query, Layout(params))
    phi = problem.layout.flatten(got.adapted)
    matrix = problem.hessians(phi) + 5.0 * torch.eye(phi.shape[1]).double()
    assert torch.linalg.eigvalsh(matrix).min() > 0
    want = 5.0 * torch.linalg.solve(matrix, problem.query_gradients(phi)).mean(0)
    torch.testing.assert_close(problem.layout.flatten(got.params), want, rtol=1e-7, atol=1e-9)


REMEDIES = {
    "EmbeddingBag": lambda: Bag(False),
    "cdist": lambda: Distances("use_mm_for_euclid_dist"),
}
NEED_NONE = {
    "LSTM": lambda: nn.LSTM(4, 4, batch_first=True),
    "GRU": lambda: nn.GRU(4, 4, batch_first=True),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "TransformerEncoder": encoder,
    "eval": lambda: encoder().eval(),
    "attention": Attention,
}
SETTING = {"MultiheadAttention": {"need_weights": False}}


@pytest.mark.filterwarnings("ignore::imaml_ext.ConvergenceWarning")
@pytest.mark.parametrize("name", REMEDIES | NEED_NONE)
def test_the_remedy_gives_the_meta_gradient_where_one_is_needed(name):
    model = Last((REMEDIES | NEED_NONE)[name](), **SETTING.get(name, {})).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss, support, query = module_loss(model, F.mse_loss), sequences(), sequences()
    got = implicit_meta_grad(loss, params, support, query, **SETTINGS)
    assert_equals_a_dense_solve(got, model, params, support, query)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    phi = adapt(loss, leaves, support, **SETTINGS)
    torch.func.vmap(loss)(phi, query).mean().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, got.params[key])
