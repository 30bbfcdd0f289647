"""Layers with weights for each task give what vmap of the layers themselves gives, to any order."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import imaml_ext
from imaml_ext import module_loss
from imaml_ext.experiments.models import conv4
from imaml_ext.ops import vmap_layers
from imaml_ext.ops.batch_norm import vmap_batch_norm
from imaml_ext.ops.conv import Conv, conv2d_of_patches
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective

TASKS = 3
CUDA = torch.cuda.is_available() and bool(imaml_ext.build_info()["cuda"])


@pytest.fixture(params=["direct", "patches"])
def form(request, monkeypatch):
    """What convolutions are made of: by themselves on the CPU, as on CUDA in the other form."""
    monkeypatch.setenv("IMAML_LAYERS", request.param)
    return request.param


@pytest.fixture
def layers_device(device, form):
    if device.type == "cuda" and form == "direct":
        pytest.skip("convolutions are made of patches there")
    return device


class Residual(nn.Module):
    """What comes out of the batch norm is used before and after the ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(0, 1))
        self.norm = nn.BatchNorm2d(5, track_running_stats=False)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return (F.relu(y) * y.sigmoid()).flatten(1)


class ChangedBetween(Residual):
    """The batch norm's result is overwritten before the ReLU."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        y.mul_(-1)
        return F.relu(y).flatten(1)


class ScaledBehind(Residual):
    """The ReLU's result is scaled."""

    def forward(self, x):
        return (2 * F.relu(self.norm(self.conv(x)))).flatten(1)


class OverwrittenBehind(Residual):
    """The same, in place, which PyTorch's own ReLU does not allow: it keeps its result."""

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))).mul_(2).flatten(1)


class View(nn.Module):
    """`view` wants memory in the order of the dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return torch.tanh(self.norm(self.conv(x))).view(x.shape[0], -1)


class Beside(Residual):
    """The ReLU after the batch norm is of something else."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return (F.relu(y) + z).flatten(1)


class Inside(Residual):
    """A transform between batch norm and ReLU."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.func.vmap(lambda row: F.relu(row).tanh())(y).flatten(1)


class OneByOne(Residual):
    """Two vmaps: over tasks, and inside over examples."""

    def forward(self, x):
        return torch.func.vmap(lambda image: self.conv(image[None])[0].tanh())(x).flatten(1)


class RunningStatistics(Residual):
    """Batch norm by its own batch, whatever statistics are handed in."""

    def forward(self, x):
        y = self.conv(x)
        mean, var = x.new_zeros(5), x.new_ones(5)
        y = F.batch_norm(y, mean, var, self.norm.weight, self.norm.bias, training=False)
        return y.flatten(1)


def norm_of(size, *dims):
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(dims) or 1]
    return kind(size, track_running_stats=False)


def convs(*modules):
    return nn.Sequential(*modules, nn.Flatten())


MODELS = {
    "conv4": (lambda: conv4(4, channels=2, filters=5, image=9), (2, 9, 9)),
    "pooling": (lambda: conv4(4, channels=2, filters=5, image=16, pool=True), (2, 16, 16)),
    "view": (View, (2, 4, 4)),
    "group norm": (lambda: convs(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU()), (2, 4, 4)),
    "relu of another": (Beside, (2, 5, 4)),
    "relu in a transform": (Inside, (2, 5, 4)),
    "examples one by one": (OneByOne, (2, 5, 4)),
    "running statistics": (RunningStatistics, (2, 5, 4)),
    "dilation of one": (lambda: convs(nn.Conv2d(2, 3, 2, dilation=(1, 2)), nn.Tanh()), (2, 4, 4)),
    "relu beside": (Residual, (2, 5, 4)),
    "scaled behind": (ScaledBehind, (2, 5, 4)),
    "overwritten": (ChangedBetween, (2, 5, 4)),
    "relu in place": (
        lambda: convs(nn.Conv2d(2, 3, 2), norm_of(3, 1, 1), nn.ReLU(inplace=True)),
        (2, 4, 4),
    ),
    "tanh": (lambda: convs(nn.Conv2d(2, 3, 2, bias=False), norm_of(3, 1, 1), nn.Tanh()), (2, 4, 4)),
    "1d": (lambda: convs(nn.Linear(4, 6), norm_of(6), nn.ReLU()), (4,)),
    "3d": (lambda: convs(nn.Conv3d(1, 3, 2), norm_of(3, 1, 1, 1), nn.ReLU()), (1, 3, 3, 3)),
    "groups": (lambda: convs(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh()), (4, 4, 4)),
    "dilation": (lambda: convs(nn.Conv2d(2, 3, 2, dilation=2), nn.Tanh()), (2, 4, 4)),
    "same": (lambda: convs(nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh()), (2, 4, 4)),
    "reflected": (
        lambda: convs(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh()),
        (2, 4, 4),
    ),
    "not affine": (
        lambda: convs(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, affine=False, track_running_stats=False)
        ),
        (2, 4, 4),
    ),
}


def make(name, frozen=(), device="cpu"):
    build, shape = MODELS[name]
    model = build().double().to(device)
    params = {n: p for n, p in model.named_parameters() if n not in frozen}
    layout = Layout(params)
    rows = layout.flatten(params).detach() + 0.1 * torch.randn(TASKS, layout.dim).double().to(
        device
    )
    data = tuple(torch.randn(TASKS, 6, *s).double().to(device) for s in (shape, (1,)))
    loss = module_loss(model, lambda z, y: (z.pow(3) * y).mean())
    return Objective(loss, layout, data), rows


def second(objective, rows, v):
    at = rows.clone().requires_grad_()
    (first,) = torch.autograd.grad(objective.losses(at).sum(), at, create_graph=True)
    (product,) = torch.autograd.grad(first, at, v, create_graph=True)
    return at, first, product


def derivatives(objective, rows):
    """Losses, gradients, Hessian products with and without a graph, Gauss-Newton products."""
    v = torch.randn_like(rows)
    _, first, product = second(objective, rows, v)
    without_graph = [objective.linearise(rows, kind).matvec(v) for kind in ("hessian", "ggn")]
    return [objective.losses(rows), first, product, *without_graph]


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def both(monkeypatch, compute):
    torch.manual_seed(1)
    got = compute()
    monkeypatch.setenv("IMAML_LAYERS", "torch")
    torch.manual_seed(1)
    return got, compute()


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_are_those_of_plain_vmap(name, layers_device, monkeypatch):
    objective, rows = make(name, device=layers_device)
    assert_close(*both(monkeypatch, lambda: derivatives(objective, rows)))


def test_what_a_joined_relu_gives_may_be_overwritten(form, monkeypatch):
    monkeypatch.setitem(MODELS, "overwritten behind", (OverwrittenBehind, (2, 5, 4)))

    def computed(name):
        torch.manual_seed(1)
        return derivatives(*make(name))

    got = computed("overwritten behind")
    monkeypatch.setenv("IMAML_LAYERS", "torch")
    assert_close(got, computed("scaled behind"))


@pytest.mark.parametrize("name", ["relu beside", "tanh", "relu in place", "1d"])
def test_the_third_derivative_is_right(name, layers_device):
    # Not against vmap: torch's own batch norm holds its statistics fast in the third derivative.
    objective, rows = make(name, device=layers_device)
    v, step = torch.randn_like(rows), 1e-5
    at, _, product = second(objective, rows, v)
    (got,) = torch.autograd.grad(product, at, v)
    ahead, behind = (second(objective, rows + s * v, v)[2].detach() for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("frozen", [("0.weight",), ("0.weight", "0.bias"), ("1.weight",)])
def test_parameters_that_tasks_share_are_left_to_vmap(frozen, layers_device, monkeypatch):
    name = "tanh" if "0.bias" not in frozen else "relu in place"
    objective, rows = make(name, frozen, layers_device)
    assert_close(*both(monkeypatch, lambda: derivatives(objective, rows)))


def count_calls(monkeypatch):
    calls = []
    for name in ("conv", "patches", "batch_norm", "batch_norm_backward"):
        original = getattr(vmap_layers, name)

        def counted(*args, name=name, original=original):
            calls.append((name, args[-1] if name.startswith("batch_norm") else None))
            return original(*args)

        monkeypatch.setattr(vmap_layers, name, counted)
    return calls


def test_the_operators_run_where_they_can(form, monkeypatch):
    calls = count_calls(monkeypatch)
    objective, rows = make("conv4")
    objective.gradient(rows)
    kinds = {
        "direct": [("conv", None), ("batch_norm", False)],
        "patches": [("patches", None), ("batch_norm", True)],
    }
    # The four ReLUs, each behind a batch norm, are part of its derivative.
    assert calls == 4 * kinds[form] + [("batch_norm_backward", True)] * 4


class Launches(TorchDispatchMode):
    """Counts the operators that compute something: all but views."""

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


@pytest.mark.parametrize(("compute", "most"), [("product", 90), ("gradient", 75)])
def test_a_hessian_product_is_few_operators_whatever_the_number_of_tasks(compute, most, form):
    few, many = launches(2, compute), launches(16, compute)
    assert few == many
    assert many.total() <= most
    assert not many["aten::convolution_backward"]
    # Parameters in rows of all parameters, and gradients on their way back, are not copied.
    assert many["aten::clone"] <= {"direct": 7, "patches": 3}[form]


def test_relu_costs_no_operator_of_its_own_where_convolutions_are_made_of_patches(monkeypatch):
    monkeypatch.setenv("IMAML_LAYERS", "patches")
    assert not launches(2, "gradient")["aten::relu"]


def test_images_of_other_channels_than_the_weights_get_torchs_message(form):
    objective, rows = make("tanh")
    objective.data = objective.data[0][:, :, :1], objective.data[1]
    with pytest.raises(RuntimeError, match=r"to have \d+ channels, but got \d+ channels"):
        objective.losses(rows)


def test_a_form_of_the_layers_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("IMAML_LAYERS", "winograd")
    objective, rows = make("tanh")
    with pytest.raises(ValueError, match="IMAML_LAYERS must be torch, direct or patches"):
        objective.losses(rows)
    monkeypatch.setenv("IMAML_LAYERS", "direct")
    with pytest.raises(ValueError, match="IMAML_LAYERS=direct is for the CPU"):
        vmap_layers.task_layers(torch.device("cuda"))


@pytest.mark.skipif(not imaml_ext.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize(
    "name",
    ["patches", "patches_transpose", "batch_norm", "batch_norm_backward",
     "batch_norm_double_backward"],
)  # fmt: skip
def test_what_the_layers_are_made_of_on_cuda_has_kernels_there(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"imaml::{name}", "CUDA")


@pytest.mark.parametrize("name", ["overwritten", "relu in place", "tanh"])
def test_a_relu_is_joined_to_a_batch_norm_only_if_it_is_next_and_apart(name, form, monkeypatch):
    calls = count_calls(monkeypatch)
    objective, rows = make(name)
    objective.gradient(rows)
    assert calls[-1] == ("batch_norm_backward", False)


def test_under_autocast_the_layers_are_torchs(monkeypatch):
    calls = count_calls(monkeypatch)
    objective, rows = make("tanh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective.losses(rows)
    assert not calls


def test_a_transform_inside_the_loss_sees_torchs_layers():
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


def test_a_batch_norm_of_one_value_a_channel_is_refused_as_torch_does():
    model = nn.Sequential(nn.Linear(2, 3), norm_of(3))
    params = dict(model.named_parameters())
    objective = Objective(
        module_loss(model, F.mse_loss), Layout(params), (torch.rand(2, 1, 2), torch.rand(2, 1, 3))
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        objective.losses(objective.layout.flatten(params).expand(2, -1))


def test_forward_mode_differentiation_is_torchs():
    objective, rows = make("tanh")
    direction = torch.randn_like(rows)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, direction)
        got = torch.autograd.forward_ad.unpack_dual(objective.losses(dual)).tangent
    torch.testing.assert_close(got, (objective.gradient(rows)[1] * direction).sum(1))


def test_statistics_survive_a_large_mean_and_a_constant_channel(dtype, device):
    torch.manual_seed(0)
    x = torch.randn(2, 500, 3, dtype=torch.float64)
    x[..., 1] += 1e5
    x[..., 2] = 1e5
    ones, zeros = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    x, ones, zeros = (t.to(device, dtype) for t in (x, ones, zeros))
    got, _, _, scale = torch.ops.imaml.batch_norm(x, ones, zeros, 1e-5, False)
    exact = x.double()
    expected = F.batch_norm(exact[0], None, None, training=True, eps=1e-5)
    tolerance = 1e-2 if dtype == torch.float32 else 1e-8  # of what is left of x beside its mean
    torch.testing.assert_close(got[0].double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scale[0, 2].item(), 1e-5**-0.5, rtol=1e-6, atol=0)


def test_a_channel_with_an_infinity_has_no_statistics(dtype, device):
    x = torch.randn(1, 9, 1, dtype=dtype, device=device)
    x[0, 4] = torch.inf
    one = torch.ones(1, 1, dtype=dtype, device=device)
    y, positive, _, scale = torch.ops.imaml.batch_norm(x, one, one, 1e-5, True)
    assert y.isnan().all()
    assert positive.isnan().all()
    assert scale.isnan().all()


def test_where_the_normalised_value_is_zero_relu_passes_nothing_back(device):
    x, zero = torch.randn(1, 5, 2, device=device), torch.zeros(1, 2, device=device)
    _, _, mean, scale = torch.ops.imaml.batch_norm(x, zero, zero, 1e-5, False)
    _, dgamma, dbeta = torch.ops.imaml.batch_norm_backward(
        torch.ones_like(x), x, zero, zero, mean, scale, True
    )
    assert not dgamma.any()
    assert not dbeta.any()


def test_batch_norm_and_convolution_pass_gradgradcheck():
    def random(*shape):
        # A slice: what comes from a row of parameters is not contiguous.
        return torch.randn(*shape, 2, dtype=torch.float64)[..., 0].requires_grad_()

    def conv(x, w, b):
        y = Conv.apply(x.contiguous(), w.contiguous(), b.contiguous(), (2, 1, 1, 0))
        return y.sin()

    def patches(x, w, b):
        return conv2d_of_patches(x.movedim(-1, 2), w, b, window=(2, 1, 1, 0)).sin()

    def norm(x, gamma, beta):
        return vmap_batch_norm(x, gamma, beta, eps=0.1, positive=True)[0].sin()

    operands = random(2, 2, 3, 3, 2), random(2, 3, 2, 3, 2), random(2, 3)
    assert torch.autograd.gradgradcheck(conv, operands)
    assert torch.autograd.gradgradcheck(patches, operands)
    assert torch.autograd.gradgradcheck(norm, (random(2, 4, 2, 2), random(2, 2), random(2, 2)))


# ---- the operators ---------------------------------------------------------------------------


def operands():
    x, w, g = torch.rand(2, 3, 5, 4, 2), torch.rand(2, 6, 2, 3, 2), torch.rand(2, 3, 3, 3, 6)
    rows, channels = torch.rand(2, 7, 3), torch.rand(2, 3)
    return {
        "conv": (x, w, torch.rand(2, 6), 2, 1, 1, 0),
        "conv_data_gradient": (g, w, 5, 4, 2, 1, 1, 0),
        "conv_weight_gradient": (x, g, 3, 2, 2, 1, 1, 0),
        "patches": (x, 3, 2, 2, 1, 1, 0),
        "patches_transpose": (torch.rand(2, 27, 12), 5, 4, 3, 2, 2, 1, 1, 0),
        "batch_norm": (rows, channels, channels, 1e-5, True),
        "batch_norm_backward": (rows, rows, *[channels] * 4, True),
        "batch_norm_double_backward": (rows, channels, channels, rows, rows, *[channels] * 4, True),
    }


@pytest.mark.parametrize("name", operands())
def test_an_operator_passes_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.imaml, name).default, operands()[name])


ON_BOTH = [name for name in operands() if not name.startswith("conv")]


@pytest.mark.skipif(not CUDA, reason="no GPU, or built without CUDA")
@pytest.mark.parametrize("name", ON_BOTH)
def test_cuda_gives_what_the_cpu_gives(name, dtype):
    operator, tolerance = getattr(torch.ops.imaml, name), torch.finfo(dtype).eps * 64
    given = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in operands()[name]]
    moved = [t.to("cuda") if isinstance(t, torch.Tensor) else t for t in given]
    torch.testing.assert_close(
        operator(*moved), operator(*given), rtol=tolerance, atol=tolerance, check_device=False
    )


@pytest.mark.parametrize("name", operands())
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.to(torch.float16),
        lambda t: t[:1],
        lambda t: t[..., :1] if t.shape[-1] > 1 else torch.cat([t, t], -1),
        lambda t: t.transpose(0, -1),
        lambda t: t[None],
        lambda t: t[:, :0],
    ],
    ids=["dtype", "tasks", "last size", "layout", "dimensions", "empty"],
)
def test_an_operator_refuses_what_does_not_fit(name, spoil):
    good = operands()[name]
    if name.startswith("patches") and spoil(good[0]).shape == good[0][:1].shape:
        return  # one operand alone may be of any number of tasks
    for position, operand in enumerate(good):
        if isinstance(operand, torch.Tensor):
            bad = [*good[:position], spoil(operand), *good[position + 1 :]]
            with pytest.raises(RuntimeError, match=rf"{name}: "):
                getattr(torch.ops.imaml, name)(*bad)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((0, 1, 0, 0), "stride"),
        ((1, 1, -1, 0), "padding"),
        ((1, 1, 0, 0), "does not fit into 2 x 2"),
    ],
)
def test_a_window_that_cannot_be_is_refused(window, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.imaml.conv(torch.rand(1, 1, 2, 2, 1), torch.rand(1, 1, 1, 3, 3), None, *window)
