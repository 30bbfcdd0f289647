"""Layers with one set of weights per task have the values and derivatives of plain vmap."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from layer_derivatives import assert_close, both, derivatives, product_with_graph
from layer_models import MODELS, TASKS, ScaledInPlace, convs, make_objective, norm_of
from torch import nn
from torch._C import _functorch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext import module_loss
from imaml_ext.experiments.models import conv4
from imaml_ext.ops import vmap_layers
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective


@pytest.fixture(params=["direct", "patches", "products"])
def form(request, monkeypatch):
    """The form of the convolutions: that of the CPU, and those of CUDA."""
    monkeypatch.setenv("IMAML_LAYERS", request.param)
    return request.param


@pytest.fixture
def layers_device(device, form):
    if device.type == "cuda" and form == "direct":
        pytest.skip("the direct form needs CPU tensors")
    return device


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_match_plain_vmap(name, layers_device, monkeypatch):
    objective, rows = make_objective(name, device=layers_device)
    assert_close(*both(monkeypatch, lambda: derivatives(objective, rows)))


def test_the_result_of_a_fused_relu_may_be_overwritten(form, monkeypatch):
    monkeypatch.setitem(MODELS, "scaled in place", (ScaledInPlace, (2, 5, 4)))

    def computed(name):
        torch.manual_seed(1)
        return derivatives(*make_objective(name))

    got = computed("scaled in place")
    monkeypatch.setenv("IMAML_LAYERS", "torch")
    assert_close(got, computed("scaled"))


@pytest.mark.parametrize("name", ["relu and sigmoid", "tanh", "relu in place", "1d", "linear"])
def test_the_third_derivative_is_right(name, layers_device):
    # Not against vmap: in the third derivative torch's batch norm treats statistics as constants.
    objective, rows = make_objective(name, device=layers_device)
    v, step = torch.randn_like(rows), 1e-5
    at, _, product = product_with_graph(objective, rows, v)
    (got,) = torch.autograd.grad(product, at, v)
    plus = product_with_graph(objective, rows + step * v, v)[2].detach()
    minus = product_with_graph(objective, rows - step * v, v)[2].detach()
    expected = (plus - minus) / (2 * step)
    assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("frozen", [("0.weight",), ("0.weight", "0.bias"), ("1.weight",)])
def test_layers_with_shared_parameters_are_left_to_vmap(frozen, layers_device, monkeypatch):
    name = "tanh" if "0.bias" not in frozen else "relu in place"
    objective, rows = make_objective(name, frozen, layers_device)
    assert_close(*both(monkeypatch, lambda: derivatives(objective, rows)))


def test_a_batch_norm_that_is_left_to_vmap_gets_contiguous_images(form, monkeypatch):
    contiguous = []
    original = torch.batch_norm

    def batch_norm(images, *rest):
        contiguous.append(_functorch.get_unwrapped(images).is_contiguous())
        return original(images, *rest)

    monkeypatch.setattr(torch, "batch_norm", batch_norm)
    objective, rows = make_objective("running statistics")
    objective.gradient(rows)
    assert contiguous
    assert all(contiguous)


@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (2, 3, 1)])
def test_a_mean_squared_error_has_the_derivatives_of_plain_vmap(shape, monkeypatch):
    layer = nn.Linear(2, 1).double()

    def loss(params, data):
        x, y = data
        z = torch.tanh(functional_call(layer, params, (x,)))
        return F.mse_loss(z.mean() if shape == () else z.reshape(shape), y)

    params = dict(layer.named_parameters())
    layout = Layout(params)
    rows = layout.flatten(params).detach() + torch.rand(TASKS, 1).double()
    data = torch.rand(TASKS, 6, 2).double(), torch.rand(TASKS, *shape).double()
    objective = Objective(loss, layout, data)

    def computed():
        _, first, product = product_with_graph(objective, rows, torch.randn_like(rows))
        return objective.losses(rows), first, product

    assert_close(*both(monkeypatch, computed))


def count_calls(monkeypatch):
    """The calls of the operators: their names, and the flag `relu` of batch norms."""
    calls = []
    for name in ("conv", "patches", "batch_norm", "batch_norm_backward"):
        original = getattr(torch.ops.imaml, name)

        def counted(*args, name=name, original=original):
            calls.append((name, args[-1] if name.startswith("batch_norm") else None))
            return original(*args)

        monkeypatch.setattr(torch.ops.imaml, name, counted)
    return calls


def test_every_layer_of_conv4_runs_an_operator(form, monkeypatch):
    calls = count_calls(monkeypatch)
    objective, rows = make_objective("conv4")
    objective.gradient(rows)
    conv = "conv" if form == "direct" else "patches"
    # The ReLU after each batch norm is fused into it and into its derivative.
    assert calls == 4 * [(conv, None), ("batch_norm", True)] + [("batch_norm_backward", True)] * 4


@pytest.mark.parametrize("name", ["overwritten", "relu in place", "tanh"])
def test_a_relu_is_fused_only_if_it_follows_directly_and_out_of_place(name, form, monkeypatch):
    calls = count_calls(monkeypatch)
    objective, rows = make_objective(name)
    objective.gradient(rows)
    assert calls[-1] == ("batch_norm_backward", False)


def test_autocast_uses_the_layers_of_torch(monkeypatch):
    calls = count_calls(monkeypatch)
    objective, rows = make_objective("tanh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective.losses(rows)
    assert not calls


class Launches(TorchDispatchMode):
    """Counts the operators other than views."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in results):
            self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def launches(tasks, compute):
    model = conv4(5)
    params = dict(model.named_parameters())
    layout = Layout(params)
    rows = layout.flatten(params).detach().expand(tasks, -1).clone()
    data = torch.rand(tasks, 5, 1, 28, 28), torch.arange(5).expand(tasks, -1)
    objective = Objective(module_loss(model, F.cross_entropy), layout, data)
    matvec, v = objective.linearise(rows, "hessian").matvec, torch.randn_like(rows)
    with Launches() as counted:
        matvec(v) if compute == "product" else objective.gradient(rows)
    return counted.count


def test_a_gradient_of_linear_layers_takes_few_operators():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    params = dict(model.named_parameters())
    layout = Layout(params)
    data = torch.rand(TASKS, 5, 3), torch.rand(TASKS, 5, 2)
    objective = Objective(module_loss(model, F.mse_loss), layout, data)
    rows = layout.flatten(params).detach().expand(TASKS, -1).clone()
    with Launches() as counted:
        objective.gradient(rows)
    # Per layer one product forward, one backward for each operand, and the sum of the bias.
    assert counted.count["aten::baddbmm"] == 2
    assert counted.count["aten::bmm"] == 3  # the data need no gradient
    assert counted.count.total() <= 20


@pytest.mark.parametrize(("compute", "most"), [("product", 90), ("gradient", 75)])
def test_a_hessian_product_takes_few_operators_for_any_number_of_tasks(compute, most, form):
    few, many = launches(2, compute), launches(16, compute)
    assert few == many
    assert many.total() <= most
    assert not many["aten::convolution_backward"]
    # Slices of the rows of parameters, and their gradients, are not copied.
    assert many["aten::clone"] <= (7 if form == "direct" else 3)
    assert many["aten::cat"] == (0 if form == "direct" else 1)


def test_no_separate_relu_is_launched(form):
    count = launches(2, "gradient")
    assert not count["aten::relu"]


def test_a_wrong_number_of_channels_raises_the_error_of_torch(form):
    objective, rows = make_objective("tanh")
    objective.data = objective.data[0][:, :, :1], objective.data[1]
    with pytest.raises(RuntimeError, match=r"to have \d+ channels, but got \d+ channels"):
        objective.losses(rows)


def test_an_unknown_form_of_the_layers_is_refused(monkeypatch):
    monkeypatch.setenv("IMAML_LAYERS", "winograd")
    objective, rows = make_objective("tanh")
    with pytest.raises(ValueError, match="IMAML_LAYERS must be one of 'torch'"):
        objective.losses(rows)
    monkeypatch.setenv("IMAML_LAYERS", "direct")
    with pytest.raises(ValueError, match="IMAML_LAYERS=direct needs CPU tensors"):
        vmap_layers.task_layers(torch.device("cuda"))


def test_a_transform_inside_the_loss_uses_the_layers_of_torch():
    model = convs(nn.Conv2d(1, 2, 2), norm_of(2, 1, 1), nn.ReLU()).double()
    params = dict(model.named_parameters())
    layout = Layout(params)

    def loss(params, data):
        x, direction = data
        outputs = lambda x: functional_call(model, params, (x,))  # noqa: E731
        value, tangent = torch.func.jvp(outputs, (x,), (direction,))
        slope = torch.func.grad(lambda x: outputs(x).pow(2).sum())(x)
        return value.pow(2).mean() + tangent.pow(2).mean() + slope.pow(2).mean()

    data = tuple(torch.randn(TASKS, 3, 1, 4, 4).double() for _ in range(2))
    rows = layout.flatten(params).detach().expand(TASKS, -1).clone()
    got = Objective(loss, layout, data).losses(rows)
    expected = [loss(params, tuple(t[i] for t in data)) for i in range(TASKS)]
    torch.testing.assert_close(got, torch.stack(expected))


def test_a_batch_norm_of_one_value_per_channel_raises_the_error_of_torch():
    model = nn.Sequential(nn.Linear(2, 3), norm_of(3))
    params = dict(model.named_parameters())
    objective = Objective(
        module_loss(model, F.mse_loss), Layout(params), (torch.rand(2, 1, 2), torch.rand(2, 1, 3))
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        objective.losses(objective.layout.flatten(params).expand(2, -1))


def test_forward_mode_differentiation_uses_the_layers_of_torch():
    objective, rows = make_objective("tanh")
    direction = torch.randn_like(rows)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, direction)
        got = torch.autograd.forward_ad.unpack_dual(objective.losses(dual)).tangent
    torch.testing.assert_close(got, (objective.gradient(rows)[1] * direction).sum(1))
