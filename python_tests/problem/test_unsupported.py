"""Layers that PyTorch cannot batch or differentiate twice are named, and the remedies work."""

import re
from contextlib import contextmanager, nullcontext

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
    Recurrence,
    Unbatched,
    encoder,
)
from problems import Problem
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from imaml_ext.problem.unsupported import cause_of, remedy

# For some layers vmap goes through the tasks one by one.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

SETTINGS = {
    "lam": 5.0,
    "inner": GradientDescent(lr=0.02, steps=3),
    "linear": ConjugateGradient(max_iter=200, rtol=1e-13),
}


@pytest.fixture(autouse=True)
def _no_hook_is_left_behind():
    yield
    assert not torch.nn.modules.module._has_any_global_hook()


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


MATH = r"sdpa_kernel\(SDPBackend.MATH\)"
TWICE = {
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        rf"^inside.layer \(MultiheadAttention\) has no second derivative in PyTorch .*{MATH}",
    ),
    "TransformerEncoder": (
        encoder,
        rf"^inside.layer.layers.0.self_attn \(MultiheadAttention\) has no second .*{MATH}",
    ),
    "eval": (
        lambda: encoder().eval(),
        rf"^inside.layer.layers.0.self_attn \(MultiheadAttention\) has no second .*{MATH}",
    ),
    "attention": (Attention, rf"^inside.layer \(Attention\) has no second derivative.*{MATH}"),
    "EmbeddingBag": (
        lambda: Bag(True),
        r"^inside.layer.bag \(EmbeddingBag\) has no second .*take nn.Embedding, and the sum",
    ),
    "cdist": (Distances, r"^inside.layer \(Distances\) has no second .*use_mm_for_euclid_dist"),
    "Function": (
        lambda: Own(OwnFunction),
        r"^inside.layer \(Own\) has no second .*write it in operators that PyTorch differentiates",
    ),
    "generated": (
        lambda: Own(Generated),
        r"^inside.layer \(Own\) has no second .*write it in operators that PyTorch differentiates",
    ),
}
SETTING = {"MultiheadAttention": {"need_weights": False}}
FIRST_ORDER = {"FOMAML": FOMAML, "Reptile": Reptile}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", TWICE)
def test_a_layer_without_a_second_derivative_is_named_with_what_to_do(name, curvature):
    make, message = TWICE[name]
    model = Last(make(), **SETTING.get(name, {})).double()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    settings = SETTINGS | {"linear": ConjugateGradient(curvature=curvature)}
    mode = model.inside["layer"].training
    with pytest.raises(RuntimeError, match=message) as caught:
        implicit_meta_grad(loss, params, sequences(), sequences(), **settings)
    assert str(caught.value).endswith("or take a method that needs none, FOMAML or Reptile")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert model.inside["layer"].training == mode
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match=message):
        meta_gradient(make(), MAML, **SETTING.get(name, {}))
    phi = adapt(loss, params, sequences(), **settings)
    with pytest.raises(RuntimeError, match=message):
        sum(t.square().sum() for t in phi.values()).backward()


@pytest.mark.parametrize("method", FIRST_ORDER)
@pytest.mark.parametrize("name", TWICE)
def test_methods_of_first_derivatives_do_without(name, method):
    got = meta_gradient(TWICE[name][0](), FIRST_ORDER[method], **SETTING.get(name, {}))
    assert all(t.isfinite().all() for t in got.params.values())
    assert any((t != 0).any() for t in got.params.values())


UNBATCHED = {
    "LSTM": (lambda: nn.LSTM(4, 4, batch_first=True), "write the recurrence out"),
    "GRU": (lambda: nn.GRU(4, 4, batch_first=True), "write the recurrence out"),
    "RNN": (lambda: nn.RNN(4, 4, batch_first=True), "write the recurrence out"),
    "Own": (lambda: Own(Unbatched), "write it in operators that PyTorch vmaps"),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_a_layer_that_vmap_does_not_take_is_named_with_what_to_do(name):
    make, what_to_do = UNBATCHED[name]
    message = rf"^inside.layer \({name}\) cannot be vmapped by PyTorch.*: {what_to_do}"
    for method in (None, FOMAML):
        with pytest.raises(RuntimeError, match=message) as caught:
            meta_gradient(make(), method)
        assert "\n" not in str(caught.value)


def test_a_layer_that_looks_at_a_value_is_named():
    with pytest.raises(RuntimeError, match=r"^inside.layer \(Deciding\) looks at a value.*where"):
        meta_gradient(Deciding())


def test_a_loss_outside_of_every_module_is_named_as_such():
    def ctc(outputs, y):
        log_probabilities = outputs.log_softmax(-1).transpose(0, 1)
        lengths = [torch.full((5,), 3), torch.full((5,), 2)]
        return F.ctc_loss(log_probabilities, torch.ones(5, 2, dtype=torch.long), *lengths)

    model = nn.Linear(4, 6).double()
    arguments = module_loss(model, ctc), dict(model.named_parameters()), sequences(), sequences()
    with pytest.raises(RuntimeError, match=r"^the loss has no second .*_ctc_loss_backward"):
        implicit_meta_grad(*arguments, lam=1.0)


def test_a_module_inside_a_plain_function_is_named_too():
    model = Last(encoder()).double()

    def loss(params, data):
        return F.mse_loss(torch.func.functional_call(model, params, (data[0],)), data[1])

    with pytest.raises(RuntimeError, match=r"^inside.layer.layers.0.self_attn \(Multihead"):
        implicit_meta_grad(loss, dict(model.named_parameters()), sequences(), sequences(), lam=1.0)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match=r"^Expected size for first two dimensions of batch2"):
        meta_gradient(nn.Linear(7, 4))
    assert cause_of(RuntimeError("out of memory")) is None


def assert_is_the_dense_one(got, model, params, support, query):
    """The solve's, from torch.func's Hessian at the same phi."""
    problem = Problem(module_loss(model, F.mse_loss), params, support, query, Layout(params))
    phi = problem.layout.flatten(got.adapted)
    matrix = problem.hessians(phi) + 5.0 * torch.eye(phi.shape[1]).double()
    assert torch.linalg.eigvalsh(matrix).min() > 0
    want = 5.0 * torch.linalg.solve(matrix, problem.query_gradients(phi)).mean(0)
    torch.testing.assert_close(problem.layout.flatten(got.params), want, rtol=1e-7, atol=1e-9)


@contextmanager
def without_the_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_fast_path_of_an_encoder_in_eval_is_named(monkeypatch):
    # It is taken where no function mode is on, as on CUDA.
    monkeypatch.setattr("imaml_ext.problem.objective.task_layers", lambda device: nullcontext())
    message = r"^inside.layer.layers.0.* has no derivative in PyTorch "
    with pytest.raises(RuntimeError, match=message + ".*set_fastpath_enabled") as caught:
        meta_gradient(encoder().eval())
    assert "FOMAML" not in str(caught.value)
    with pytest.raises(RuntimeError, match=message):
        meta_gradient(encoder().eval(), FOMAML)
    with without_the_fast_path():
        meta_gradient(encoder().eval(), FOMAML)


REMEDIES = {
    "MultiheadAttention": TWICE["MultiheadAttention"][0],
    "TransformerEncoder": encoder,
    "eval": lambda: encoder().eval(),
    "attention": Attention,
    "EmbeddingBag": lambda: Bag(False),
    "cdist": lambda: Distances("use_mm_for_euclid_dist"),
    "LSTM": Recurrence,
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_gives_the_meta_gradient(name):
    model = Last(REMEDIES[name](), **SETTING.get(name, {})).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss, support, query = module_loss(model, F.mse_loss), sequences(), sequences()
    with sdpa_kernel(SDPBackend.MATH), without_the_fast_path():
        got = implicit_meta_grad(loss, params, support, query, **SETTINGS)
        assert_is_the_dense_one(got, model, params, support, query)
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        phi = adapt(loss, leaves, support, **SETTINGS)
        torch.func.vmap(loss)(phi, query).mean().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, got.params[key])


def test_the_recurrence_written_out_is_the_lstm():
    ours, torchs = Recurrence().double(), nn.LSTM(4, 4, batch_first=True).double()
    names = {"x.weight": "weight_ih_l0", "x.bias": "bias_ih_l0"}
    names |= {"h.weight": "weight_hh_l0", "h.bias": "bias_hh_l0"}
    ours.load_state_dict({n: torchs.state_dict()[other] for n, other in names.items()})
    x = sequences()[0][0]
    torch.testing.assert_close(ours(x)[:, 0], torchs(x)[0][:, -1])


# What PyTorch 2.10 to 2.13 say on CUDA, where these tests may not run.
ON_CUDA = [
    (
        "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not "
        "supported for CuDNN RNNs due to limitations in the CuDNN API.",
        r"torch.backends.cudnn.flags\(enabled=False\)",
    ),
    ("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented", MATH),
    (
        "derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented",
        MATH,
    ),
    (
        "derivative for aten::_scaled_dot_product_cudnn_attention_backward is not implemented",
        MATH,
    ),
    (
        "Batching rule not implemented for aten::_thnn_fused_lstm_cell; the fallback path doesn't "
        "work on out= or view ops.",
        "write the recurrence out",
    ),
]


@pytest.mark.parametrize(("says", "what_to_do"), ON_CUDA)
def test_what_pytorch_says_on_cuda_is_understood(says, what_to_do):
    cause = cause_of(NotImplementedError(says))
    assert cause is not None
    assert re.search(what_to_do, remedy(cause))
