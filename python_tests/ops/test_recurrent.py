"""Recurrent layers and attention in losses have the derivatives of PyTorch's own for each task."""

import copy
import math
from functools import partial

import pytest
import torch
from awkward_layers import Last
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from imaml_ext import (
    FOMAML,
    IMAML,
    ConjugateGradient,
    GradientDescent,
    Programs,
    TaskBatch,
    adapt,
    implicit_meta_grad,
    module_loss,
    reference,
)
from imaml_ext.ops.vmap_forms import vmap_forms
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective

TASKS = 2
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_each_task_agrees(loss, params, data, shared=None, curvature=("hessian",)):
    """Losses and gradients are those of `loss` for one task, without vmap.

    Products with the curvature are those with differences of PyTorch's gradients, or of outputs.
    """
    layout = Layout(params)
    rows = layout.flatten({name: t.expand(TASKS, *t.shape) for name, t in params.items()})
    rows = rows.detach() + 0.1 * torch.randn_like(rows)
    vector, step = torch.randn_like(rows), 1e-5
    objective = Objective(loss, layout, data, shared=shared)
    ours = {kind: objective.linearise(rows, kind) for kind in curvature}

    def gradient(row, task):
        row = row.clone().requires_grad_()
        one = pytree.tree_map(lambda t: t[task], data)
        value = loss(layout.unflatten(row) | (shared or {}), one)
        return value.detach(), torch.autograd.grad(value, row)[0]

    for task in range(TASKS):
        row, v = rows[task], vector[task]
        value, want = gradient(row, task)
        for at in ours.values():
            assert_close(at.losses[task], value, **EXACT)
            assert_close(at.gradient[task], want, **EXACT)
        ahead, behind = (gradient(row + sign * step * v, task)[1] for sign in (1, -1))
        hvp = ours["hessian"].matvec(vector)[task]
        assert_close(hvp, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
        if "ggn" in ours:  # of a mean squared error

            def outputs(row, task=task):
                return loss.outputs(layout.unflatten(row), data[0][task])

            jacobian = torch.autograd.functional.jacobian(outputs, row)
            product = 2 / len(jacobian) * jacobian.T @ (jacobian @ v)
            assert_close(ours["ggn"].matvec(vector)[task], product, **EXACT)


class All(nn.Module):
    """All outputs of a layer in one vector; its state is learned, if it is given."""

    def __init__(self, layer, *states, **settings):
        super().__init__()
        self.layer, self.settings = layer, settings
        self.states = nn.ParameterList(nn.Parameter(randn(*shape)) for shape in states)

    def forward(self, x):
        states = tuple(self.states)
        if isinstance(self.layer, nn.MultiheadAttention):
            states = (x, x)
        elif isinstance(self.layer, nn.TransformerDecoderLayer):
            states = (x.cos(),)
        elif len(states) == 2:
            states = (states,)
        outputs = self.layer(x, *states, **self.settings)
        return torch.cat([t.flatten() for t in pytree.tree_leaves(outputs) if t is not None])


def assert_module_agrees(model, *shape, curvature=("hessian",)):
    model = model.double()
    x = randn(TASKS, *shape)
    y = randn(TASKS, *model(x[0]).shape)
    params = dict(model.named_parameters())
    loss = module_loss(model, F.mse_loss)
    assert_each_task_agrees(loss, params, (x, y), curvature=curvature)


BOTH = {"bidirectional": True, "batch_first": True}
RECURRENT = {  # [T=3, N=2, 3], or [N=3, T=2, 3] with batch_first
    "LSTM": lambda: All(nn.LSTM(3, 4)),
    "LSTM with states": lambda: All(nn.LSTM(3, 2), (1, 2, 2), (1, 2, 2)),
    "deep LSTM": lambda: All(nn.LSTM(3, 2, 2, **BOTH), (4, 3, 2), (4, 3, 2)),
    "LSTM without bias": lambda: All(nn.LSTM(3, 2, 2, bias=False, batch_first=True)),
    "projected LSTM": lambda: All(nn.LSTM(3, 4, 2, proj_size=2, **BOTH), (4, 3, 2), (4, 3, 4)),
    "projected, without bias": lambda: All(nn.LSTM(3, 3, proj_size=2, bias=False)),
    "LSTM, all dropped": lambda: All(nn.LSTM(3, 2, 3, dropout=1.0)),
    "LSTM in eval": lambda: All(nn.LSTM(3, 2, 2, dropout=0.5)).eval(),
    "GRU": lambda: All(nn.GRU(3, 4)),
    "deep GRU": lambda: All(nn.GRU(3, 2, 2, **BOTH), (4, 3, 2)),
    "GRU without bias": lambda: All(nn.GRU(3, 2, bias=False, bidirectional=True)),
    "RNN": lambda: All(nn.RNN(3, 4)),
    "deep RNN": lambda: All(nn.RNN(3, 2, 2, **BOTH), (4, 3, 2)),
    "ReLU": lambda: All(nn.RNN(3, 3, nonlinearity="relu", bias=False)),
}
UNBATCHED = {  # [T=3, 3]
    "LSTM": lambda: All(nn.LSTM(3, 2, bidirectional=True)),
    "LSTM with states": lambda: All(nn.LSTM(3, 2, batch_first=True), (1, 2), (1, 2)),
    "GRU": lambda: All(nn.GRU(3, 2, batch_first=True), (1, 2)),
    "RNN": lambda: All(nn.RNN(3, 2)),
}
CELLS = {  # [N=2, 3]
    "LSTMCell": lambda: All(nn.LSTMCell(3, 4)),
    "LSTMCell with states": lambda: All(nn.LSTMCell(3, 2, bias=False), (2, 2), (2, 2)),
    "GRUCell": lambda: All(nn.GRUCell(3, 2), (2, 2)),
    "GRUCell without bias": lambda: All(nn.GRUCell(3, 2, bias=False)),
    "RNNCell": lambda: All(nn.RNNCell(3, 2), (2, 2)),
    "ReLU": lambda: All(nn.RNNCell(3, 2, nonlinearity="relu")),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    curvature = ("hessian", "ggn") if name in ("deep LSTM", "GRU") else ("hessian",)
    assert_module_agrees(RECURRENT[name](), 3, 2, 3, curvature=curvature)


@pytest.mark.parametrize("name", UNBATCHED)
def test_recurrent_layers_of_one_sequence(name):
    assert_module_agrees(UNBATCHED[name](), 3, 3)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    assert_module_agrees(CELLS[name](), 2, 3)


def test_a_cell_of_one_example():
    assert_module_agrees(All(nn.LSTMCell(3, 2), (2,), (2,)), 3)


ENCODER = partial(nn.TransformerEncoderLayer, 4, 2, 6, dropout=0.0)
PADDING = torch.tensor([[False, False, True]] * 2)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
ATTENTION = {  # [N=2, T=3, 4]
    "attention": lambda: All(nn.MultiheadAttention(4, 2), need_weights=False),
    "separate widths": lambda: All(
        nn.MultiheadAttention(4, 2, kdim=4, vdim=4, add_bias_kv=True, batch_first=True),
        need_weights=False,
    ),
    "masked": lambda: All(
        nn.MultiheadAttention(4, 2, batch_first=True, add_zero_attn=True),
        need_weights=False,
        key_padding_mask=PADDING,
        attn_mask=CAUSAL.isinf(),
    ),
    "with weights": lambda: All(nn.MultiheadAttention(4, 2, bias=False), need_weights=True),
    "encoder layer": lambda: All(ENCODER(batch_first=True)),
    "encoder layer in eval": lambda: All(ENCODER(batch_first=True, activation="gelu")).eval(),
    "norm first": lambda: All(ENCODER(norm_first=True)),
    "causal encoder": lambda: All(
        nn.TransformerEncoder(ENCODER(batch_first=True), 2), mask=CAUSAL
    ).eval(),
    "padded encoder in eval": lambda: All(
        nn.TransformerEncoder(ENCODER(batch_first=True), 1), src_key_padding_mask=PADDING
    ).eval(),
    "decoder layer": lambda: All(
        nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True), tgt_mask=CAUSAL
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ATTENTION)
def test_layers_with_attention(name):
    curvature = ("hessian", "ggn") if name == "encoder layer in eval" else ("hessian",)
    assert_module_agrees(ATTENTION[name](), 2, 3, 4, curvature=curvature)


@pytest.mark.parametrize("kind", ["LSTM", "encoder layer", "masked"])
def test_without_the_layers_of_this_package(kind, monkeypatch):
    monkeypatch.setenv("IMAML_LAYERS", "torch")
    assert_module_agrees((RECURRENT | ATTENTION)[kind](), 2, 3, 3 if kind == "LSTM" else 4)


Q, KV = (2, 4, 3, 2), (2, 4, 5, 2)  # [N, heads, length, width]
MASK = torch.arange(15).reshape(3, 5) % 3 != 0
FULLY_MASKED = MASK & torch.tensor([True, False, True])[:, None]
SDPA = {
    "plain": (Q, KV, {}),
    "of matrices": (Q[2:], KV[2:], {"scale": -0.7}),
    "causal": (Q, KV, {"is_causal": True}),
    "causal and short": (KV, Q, {"is_causal": True, "scale": 2.0}),
    "boolean mask": (Q, KV, {"attn_mask": MASK}),
    "fully masked row": (Q, KV, {"attn_mask": FULLY_MASKED}),
    "row of -inf": (Q, KV, {"attn_mask": torch.where(FULLY_MASKED, 0.3, -math.inf).double()}),
    "grouped queries": (Q, (2, 2, 5, 2), {"enable_gqa": True, "attn_mask": MASK}),
}


@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name):
    query, key, settings = SDPA[name]
    params = {"q": randn(*query), "k": randn(*key), "v": randn(*key)}

    def loss(params, w):
        outputs = F.scaled_dot_product_attention(*params.values(), **settings)
        return (outputs.sin() * w).sum()

    assert_each_task_agrees(loss, params, randn(TASKS, *query))


def test_a_mask_of_each_task_may_be_part_of_the_data():
    def loss(params, data):
        bias, mask = data
        outputs = F.scaled_dot_product_attention(**params, attn_mask=bias)
        masked = F.scaled_dot_product_attention(**params, attn_mask=mask)
        return (outputs * masked).sum()

    params = {"query": randn(3, 2), "key": randn(4, 2), "value": randn(4, 2)}
    mask = torch.arange(24).reshape(2, 3, 4) % 5 != 0
    assert_each_task_agrees(loss, params, (randn(2, 3, 4), mask))


def test_the_masks_of_an_encoder_may_be_part_of_the_data():
    model = nn.TransformerEncoder(ENCODER(batch_first=True), 1, enable_nested_tensor=False)
    model.double().eval()

    def loss(params, data):
        x, mask, padding = data
        settings = {"mask": mask, "src_key_padding_mask": padding, "is_causal": False}
        return functional_call(model, params, (x,), settings).sin().sum()

    masks = torch.arange(18).reshape(2, 3, 3) % 5 == 4, torch.arange(12).reshape(2, 2, 3) % 3 == 2
    params = dict(model.named_parameters())
    assert_each_task_agrees(loss, params, (randn(TASKS, 2, 3, 4), *masks))


@pytest.mark.parametrize(
    "arguments", [{"is_causal": True, "attn_mask": MASK}, {"enable_gqa": True}]
)
def test_invalid_arguments_of_attention_raise_the_error_of_torch(arguments):
    def attend(q):
        return F.scaled_dot_product_attention(q, q[:3], q[:3], **arguments)

    q = randn(TASKS, 4, 3, 5, 2)
    with pytest.raises(RuntimeError) as ours, vmap_forms():
        vmap(lambda q: enter(attend, q))(q)
    with pytest.raises(RuntimeError) as torchs:
        attend(q[0])
    assert str(ours.value) == str(torchs.value)


def enter(function, *args):
    """`function` with the forms, which only a function that vmap maps can enter."""
    with vmap_forms():
        return function(*args)


def test_a_plain_function_may_call_a_module_functionally():
    model = nn.LSTM(3, 2, batch_first=True).double()

    def loss(params, data):
        outputs, _ = functional_call(model, params, (data[0],))
        return F.mse_loss(outputs[:, -1], data[1])

    data = randn(TASKS, 4, 3, 3), randn(TASKS, 4, 2)
    assert_each_task_agrees(loss, dict(model.named_parameters()), data)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_weights_may_be_shared_or_frozen(kind):
    layer, head = kind(3, 2, 2).double(), nn.Linear(2, 1).double()
    frozen = {name: p.detach() for name, p in layer.named_parameters() if name.endswith("l1")}
    shared = {name: p for name, p in layer.named_parameters() if name not in frozen}

    def loss(params, data):
        params = dict(params)
        own = {name: params.pop(name) for name in ("weight", "bias")}
        outputs, _ = functional_call(layer, frozen | params, (data[0],))
        return F.mse_loss(functional_call(head, own, (outputs[-1],)), data[1])

    data = randn(TASKS, 3, 4, 3), randn(TASKS, 4, 1)
    params = dict(head.named_parameters())
    constant = {name: p.detach() for name, p in shared.items()}
    assert_each_task_agrees(loss, params, data, shared=constant)
    layout = Layout(params)
    rows = layout.flatten(params).expand(TASKS, -1).detach()
    losses = Objective(loss, layout, data, shared=shared, check=False).losses(rows)
    got = torch.autograd.grad(losses.sum(), list(shared.values()))
    each = [loss(params | shared, tuple(t[k] for t in data)) for k in range(TASKS)]
    assert_close(got, torch.autograd.grad(sum(each), list(shared.values())), **EXACT)


def test_the_gradient_of_the_inputs_may_be_part_of_a_loss():
    model = nn.GRU(3, 2).double()

    def loss(params, x):
        def total(x):
            return functional_call(model, params, (x,))[0].sum()

        return grad(total)(x).square().sum()

    assert_each_task_agrees(loss, dict(model.named_parameters()), randn(TASKS, 3, 2, 3))


def linear_layers(dropout):
    """A linear function of positive inputs: layers with positive weights and ReLU."""
    layer = nn.RNN(2, 2, 2, nonlinearity="relu", bias=False, dropout=dropout).double()
    for p in layer.parameters():
        p.data.abs_()
    return layer


@pytest.mark.parametrize("kind", ["RNN", "attention"])
def test_dropout_draws_for_each_task_and_keeps_the_mean(kind):
    tasks, x = 4000, randn(3, 1, 2).abs()
    layer = linear_layers(0.5)

    def outputs(x, dropout):
        if kind == "RNN":
            return layer.train(dropout > 0)(x)[0]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout)

    drawn = vmap(partial(enter, outputs), in_dims=(0, None), randomness="different")(
        x.expand(tasks, -1, -1, -1), 0.5
    )
    want = outputs(x, 0.0)
    assert drawn.std(0).min() > 0.01
    assert ((drawn.mean(0) - want).abs() < 5 * drawn.std(0) / math.sqrt(tasks)).all()


def test_the_last_layer_is_not_dropped():
    layer = linear_layers(1.0)
    for p in layer.parameters():
        p.data.zero_()
    layer.weight_hh_l1.data.fill_(1.0)
    x, h = randn(TASKS, 3, 1, 2), torch.ones(2, 1, 2).double()
    got = vmap(lambda x: enter(layer, x, h)[0], randomness="different")(x)
    assert_close(got, torch.tensor([2.0, 4.0, 8.0]).double().view(3, 1, 1).expand(TASKS, 3, 1, 2))


LSTM, GRU, CELL = (kind(3, 2).double() for kind in (nn.LSTM, nn.GRU, nn.GRUCell))
PACKED = pack_padded_sequence(randn(3, 2, 3), [3, 2])
PACKING = r"packed sequences .*: pad the sequences, and make the mask"
ERRORS = {
    "no steps": (lambda x: LSTM(x[:0]), "sequence length to be larger than 0"),
    "width": (lambda x: LSTM(x[..., :2]), r"input.size\(-1\) must be equal to input_size"),
    "state": (
        lambda x: CELL(x[0], x[0, :1, :2]),
        r"hx must be of shape \[2, 2\], got \[1, 2\]",
    ),
    "packing": (lambda x: LSTM(pack_padded_sequence(x, [3, 2])), PACKING),
    "a packed LSTM": (lambda x: LSTM(PACKED), PACKING),
    "a packed GRU": (lambda x: GRU(PACKED), PACKING),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    function, message = ERRORS[name]
    with pytest.raises(RuntimeError, match=message):
        vmap(partial(enter, function))(randn(TASKS, 3, 2, 3))


def test_weights_of_a_task_are_not_arranged_for_cudnn(monkeypatch):
    model = nn.LSTM(3, 2).double()
    x = randn(TASKS, 3, 2, 3)
    stacked = {name: torch.stack([p, p]) for name, p in model.named_parameters()}
    arranged = []
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: arranged.append(args))
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda t: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def outputs(params, x):
        return functional_call(model, params, (x,))[0]

    got = vmap(partial(enter, outputs))(stacked, x)
    vmap(partial(enter, outputs), in_dims=(None, 0))(
        {n: p.clone() for n, p in model.named_parameters()}, x
    )
    with pytest.raises(RuntimeError, match="data pointer"):
        vmap(lambda x: enter(torch.Tensor.data_ptr, x))(x)
    monkeypatch.undo()
    assert not arranged
    assert_close(got, torch.stack([model(each)[0] for each in x]), **EXACT)


class LSTMByHand(nn.Module):
    """nn.LSTM(4, 4, batch_first=True) from its formulas."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(4, 16), nn.Linear(4, 16)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            i, f, g, o = (self.x(step) + self.h(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h[:, None]


class GRUByHand(nn.Module):
    """nn.GRU(4, 4, batch_first=True) from its formulas."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(4, 12), nn.Linear(4, 12)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            (r, z, n), (r_h, z_h, n_h) = self.x(step).chunk(3, -1), self.h(h).chunk(3, -1)
            z = (z + z_h).sigmoid()
            h = (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h
        return h[:, None]


MODELS = {
    "LSTM": (lambda: nn.LSTM(4, 4, batch_first=True), LSTMByHand),
    "GRU": (lambda: nn.GRU(4, 4, batch_first=True), GRUByHand),
    "encoder": (lambda: ENCODER(batch_first=True), None),
    "eval": (lambda: ENCODER(batch_first=True).eval(), None),
}


@pytest.mark.filterwarnings("ignore::imaml_ext.ConvergenceWarning")
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients_are_those_of_the_reference(name):
    layer, layer_by_hand = MODELS[name]
    model = Last(layer()).double()
    by_hand = Last(layer_by_hand()) if layer_by_hand else copy.deepcopy(model)
    names = NAMES if layer_by_hand else {}
    params = dict(model.named_parameters())
    layout, loss = Layout(params), module_loss(model, F.mse_loss)
    support, query = ((randn(TASKS, 5, 3, 4), randn(TASKS, 5, 1)) for _ in "sq")

    def of_one(row, data):
        own = {names.get(name, name): t for name, t in layout.unflatten(row).items()}
        return F.mse_loss(functional_call(by_hand, own, (data[0],)), data[1])

    theta, lam = layout.flatten(params).detach(), torch.tensor(20.0).double()
    settings = {"lr": 0.02, "inner_steps": 3, "cg_steps": 6}
    want = []
    with sdpa_kernel(SDPBackend.MATH):
        for task in range(TASKS):
            sets = [tuple(t[task] for t in each) for each in (support, query)]
            want.append(reference.implicit_meta_gradient(of_one, theta, *sets, lam, **settings)[0])
    solvers = {
        "lam": 20.0,
        "inner": GradientDescent(lr=0.02, steps=3),
        "linear": ConjugateGradient(max_iter=6, rtol=0.0),
    }
    got = implicit_meta_grad(loss, params, support, query, **solvers)
    assert_close(layout.flatten(got.params), torch.stack(want).mean(0), rtol=1e-8, atol=1e-10)
    phi = adapt(loss, params, support, **solvers)
    vmap(loss)(phi, query).mean().backward()
    assert_close({n: p.grad for n, p in params.items()}, dict(got.params))


NAMES = {
    "inside.layer.weight_ih_l0": "inside.layer.x.weight",
    "inside.layer.bias_ih_l0": "inside.layer.x.bias",
    "inside.layer.weight_hh_l0": "inside.layer.h.weight",
    "inside.layer.bias_hh_l0": "inside.layer.h.bias",
}


def attending(params, data):
    x, y = data
    causal = F.scaled_dot_product_attention(x, x @ params["w"], x, is_causal=True)
    masked = F.scaled_dot_product_attention(causal, x, x, attn_mask=FULLY_MASKED[:, :3])
    return F.mse_loss(masked @ params["w"], y)


@pytest.mark.parametrize("kind", ["GRU", "attention"])
def test_programs_give_the_same(kind):
    loss, params = attending, {"w": randn(4, 4).requires_grad_()}
    support, query = ((randn(TASKS, 2, 3, 4), randn(TASKS, 2, 3, 4)) for _ in "sq")
    if kind == "GRU":
        model = All(nn.GRU(4, 2, batch_first=True)).double()
        loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
        support, query = ((x[:, :, :2], y.flatten(1)[:, :12]) for x, y in (support, query))
    settings = {"inner": GradientDescent(lr=0.02, steps=2)}
    method = FOMAML(loss, params, **settings)
    if kind == "GRU":
        settings["linear"] = ConjugateGradient(max_iter=3)
        method = IMAML(loss, params, lam=5.0, **settings)
    tasks, programs = TaskBatch(support, query), Programs()
    want = method.meta_gradient(tasks)
    for _ in range(10):  # the state of the model does not change
        with programs.use():
            got = method.meta_gradient(tasks)
    assert not programs.refusals
    assert_close(got.named(), want.named())
