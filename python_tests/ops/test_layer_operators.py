"""The operators of the layers: values, derivatives and refusals. test_fuzz_ops.py draws shapes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import imaml_ext
from imaml_ext.ops.batch_norm import batch_norm
from imaml_ext.ops.conv import batched_product, direct_conv2d, patches_conv2d

CUDA = torch.cuda.is_available() and bool(imaml_ext.build_info()["cuda"])


def operands():
    x, w, g = torch.rand(2, 3, 5, 4, 2), torch.rand(2, 6, 2, 3, 2), torch.rand(2, 3, 3, 3, 6)
    rows, channels = torch.rand(2, 7, 3), torch.rand(2, 3)
    return {
        "conv": (x, w, torch.rand(2, 6), 2, 1, 1, 0),
        "conv_data_gradient": (g, w, 5, 4, 2, 1, 1, 0),
        "conv_weight_gradient": (x, g, 3, 2, 2, 1, 1, 0),
        "conv_weight_gradient_": (torch.empty_like(w), x, g, 2, 1, 1, 0),
        "patches": (x, 3, 2, 2, 1, 1, 0),
        "patches_transpose": (torch.rand(2, 27, 12), 5, 4, 3, 2, 2, 1, 1, 0),
        "channel_sums": (rows,),
        "batched_product": (torch.rand(2, 7, 3), torch.rand(2, 4, 3), False, True),
        "batch_norm": (rows, channels, channels, 1e-5, True),
        "batch_norm_backward": (rows, rows, *[channels] * 4, True),
        "batch_norm_double_backward": (rows, channels, channels, rows, rows, *[channels] * 4, True),
    }


@pytest.mark.parametrize("name", operands())
def test_an_operator_passes_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.imaml, name).default, operands()[name])


def test_weight_gradients_are_written_to_slices_of_rows():
    x, g, *_ = operands()["conv_weight_gradient"]
    rows = torch.full((2, 100), torch.nan)
    slices = rows[:, 10:82].view(2, 6, 2, 3, 2)
    torch.ops.imaml.conv_weight_gradient_(slices, x, g, 2, 1, 1, 0)
    want = torch.nn.grad.conv2d_weight(
        x[1].permute(0, 3, 1, 2), (6, 2, 3, 2), g[1].permute(0, 3, 1, 2), (2, 1), (1, 0)
    )
    torch.testing.assert_close(rows[1, 10:82], want.flatten())
    assert rows[:, :10].isnan().all()
    assert rows[:, 82:].isnan().all()


def test_weight_gradients_are_not_written_where_they_overlap():
    x, g, *_ = operands()["conv_weight_gradient"]
    memory = torch.rand(400)
    x_in_memory = memory[80:].as_strided(x.shape, x.stride())
    for stride, images, match in ((0, x, "must not overlap"), (100, x_in_memory, "share memory")):
        dw = memory.as_strided((2, 6, 2, 3, 2), (stride, 12, 6, 2, 1))
        with pytest.raises(RuntimeError, match=match):
            torch.ops.imaml.conv_weight_gradient_(dw, images, g, 2, 1, 1, 0)


ON_BOTH = [name for name in operands() if not name.startswith("conv")]


@pytest.mark.skipif(not imaml_ext.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize(
    "name",
    ["patches", "patches_transpose", "batched_product", "channel_sums", "batch_norm",
     "batch_norm_backward", "batch_norm_double_backward"],
)  # fmt: skip
def test_the_operators_that_layers_need_on_cuda_have_cuda_kernels(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"imaml::{name}", "CUDA")


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
def test_an_operator_refuses_invalid_operands(name, spoil):
    good = operands()[name]
    single = name.startswith("patches") or name == "channel_sums"
    if single and spoil(good[0]).shape == good[0][:1].shape:
        return  # a single operand may have any number of tasks
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
        ((1, 1, 0, 0), "does not fit into a 2 x 2 image"),
    ],
)
def test_an_invalid_window_is_refused(window, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.imaml.conv(torch.rand(1, 1, 2, 2, 1), torch.rand(1, 1, 1, 3, 3), None, *window)


def test_statistics_do_not_overflow_where_squares_do(dtype, device):
    x = torch.randn(2, 70, 3, dtype=dtype, device=device)
    ones, zeros = torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0])
    y, _, mean, scale = torch.ops.imaml.batch_norm(1e25 * x, ones, zeros, 1e-5, False)
    double = x.double()
    expected = (double - double.mean(1, True)) / double.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    a, g = torch.randn(2, *x.shape, dtype=dtype, device=device)
    operands = 1e25 * a, zeros, zeros, 1e25 * g, 1e25 * x, ones, zeros, mean, scale
    got = torch.ops.imaml.batch_norm_double_backward(*operands, False)[2]
    g = g.double() - g.double().mean(1, True) - (expected * g).mean(1, True) * expected
    to_gamma = (a * g).sum(1) / double.std(1, correction=0)
    torch.testing.assert_close(1e-25 * got.double(), to_gamma, rtol=1e-4, atol=1e-4)


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
    tolerance = 1e-2 if dtype == torch.float32 else 1e-8  # relative to x minus its mean
    torch.testing.assert_close(got[0].double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scale[0, 2].item(), 1e-5**-0.5, rtol=1e-6, atol=0)


def test_a_channel_with_an_infinity_is_nan(dtype, device):
    x = torch.randn(1, 9, 1, dtype=dtype, device=device)
    x[0, 4] = torch.inf
    one = torch.ones(1, 1, dtype=dtype, device=device)
    y, positive, _, scale = torch.ops.imaml.batch_norm(x, one, one, 1e-5, True)
    assert y.isnan().all()
    assert positive.isnan().all()
    assert scale.isnan().all()


def test_where_the_normalised_value_is_zero_relu_has_no_gradient(device):
    x, zero = torch.randn(1, 5, 2, device=device), torch.zeros(1, 2, device=device)
    _, _, mean, scale = torch.ops.imaml.batch_norm(x, zero, zero, 1e-5, False)
    _, dgamma, dbeta = torch.ops.imaml.batch_norm_backward(
        torch.ones_like(x), x, zero, zero, mean, scale, True
    )
    assert not dgamma.any()
    assert not dbeta.any()


def test_batch_norm_and_convolution_pass_gradgradcheck():
    def random(*shape):
        # Slices of rows of parameters are not contiguous.
        return torch.randn(*shape, 2, dtype=torch.float64)[..., 0].requires_grad_()

    def norm(x, gamma, beta):
        return batch_norm(x, gamma, beta, eps=0.1)[0].sin()

    operands = random(2, 2, 2, 3, 3), random(2, 3, 2, 3, 2), random(2, 3)
    for conv2d in (direct_conv2d, patches_conv2d, partial(patches_conv2d, own=True)):
        assert torch.autograd.gradgradcheck(
            lambda *operands, conv2d=conv2d: conv2d(*operands, window=(2, 1, 1, 0)).sin(), operands
        )
    assert torch.autograd.gradgradcheck(norm, (random(2, 4, 2, 2), random(2, 2), random(2, 2)))


def with_derivatives(product, a, b):
    """The product, and the first and second derivatives of a function of it."""
    a, b = a.requires_grad_(), b.requires_grad_()
    y = product(a, b)
    first = torch.autograd.grad(y.sin().sum(), (a, b), create_graph=True)
    return y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize(("rows", "columns", "terms"), [(33, 9, 70), (1, 64, 576), (90, 65, 3)])
def test_a_batched_product_has_the_derivatives_of_bmm(
    rows, columns, terms, transpose_a, transpose_b, dtype, device
):
    torch.manual_seed(0)
    a = torch.randn(2, *((terms, rows) if transpose_a else (rows, terms)), dtype=dtype)
    parameters = torch.randn(2, terms * columns + 3, dtype=dtype)
    sizes = (columns, terms) if transpose_b else (terms, columns)
    b = parameters[:, 1:-2].unflatten(1, sizes)
    got = with_derivatives(
        lambda a, b: batched_product(a, b, transpose_a, transpose_b, True),
        a.to(device), parameters.to(device)[:, 1:-2].unflatten(1, sizes),
    )  # fmt: skip
    want = with_derivatives(
        lambda a, b: (a.mT if transpose_a else a) @ (b.mT if transpose_b else b),
        a.detach().double(), b.double(),
    )  # fmt: skip
    for one, expected in zip(got, want, strict=True):
        atol = 2000 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(one.double().cpu(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("rows", "columns", "terms"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_an_empty_batched_product_is_that_of_bmm(rows, columns, terms, device):
    a, b = torch.rand(2, rows, terms, device=device), torch.rand(2, terms, columns, device=device)
    assert torch.equal(
        batched_product(a, b, False, False, True), torch.zeros(2, rows, columns).to(a)
    )


@pytest.mark.skipif(not CUDA, reason="no GPU, or built without CUDA")
def test_under_autocast_and_in_tf32_products_are_those_of_torch(monkeypatch):
    a, calls, original = torch.rand(2, 40, 40).cuda(), [], torch.ops.imaml.batched_product

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(torch.ops.imaml, "batched_product", counted)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert batched_product(a, a, False, False, True).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    batched_product(a, a, False, False, True)
    assert not calls
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    batched_product(a, a, False, False, True)
    assert len(calls) == 1
