"""Convolutions with one set of weights per task, with derivatives of any order.

Shapes are those of `csrc/schemas.cpp`: images [B, N, H, W, C], weights [B, O, C, kH, kW]. A
`Window` holds the strides and paddings, (sH, sW, pH, pW).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imaml_ext.ops.batching import channels_first, channels_last, contiguous_per_task
from imaml_ext.ops.extension import fake
from imaml_ext.ops.row_slices import destination

Pair = tuple[int, int]
Window = tuple[int, int, int, int]


# A Function must save the tensors it was given: a contiguous copy made inside `forward` would be
# outside the graph, and the next derivative would miss it. So callers make the copies.


class Conv(torch.autograd.Function):
    """x * w + bias, as [B, N, H', W', O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, window: Window) -> Any:
        ctx.save_for_backward(x, w)
        ctx.window = window
        return torch.ops.imaml.conv(x, w, bias, *window)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias, _ = ctx.needs_input_grad
        g = g.contiguous()
        return (
            ConvDataGradient.apply(g, w, x.shape[2:4], ctx.window) if need_x else None,
            _weight_gradient(ctx, x, g) if need_w else None,
            g.sum((1, 2, 3)) if need_bias else None,
            None,
        )


class ConvDataGradient(torch.autograd.Function):
    """The gradient of `<g, x * w>` with respect to x: linear in g and in w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, size: Pair, window: Window) -> Any:
        ctx.save_for_backward(g, w)
        ctx.window = window
        return torch.ops.imaml.conv_data_gradient(g, w, *size, *window)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        g, w = ctx.saved_tensors
        need_g, need_w, _, _ = ctx.needs_input_grad
        x = x.contiguous()
        return (
            Conv.apply(x, w, None, ctx.window) if need_g else None,
            _weight_gradient(ctx, x, g) if need_w else None,
            None,
            None,
        )


class ConvWeightGradient(torch.autograd.Function):
    """The gradient of `<g, x * w>` with respect to w: linear in x and in g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, kernel: Pair, window: Window) -> Any:
        ctx.save_for_backward(x, g)
        ctx.window = window
        return torch.ops.imaml.conv_weight_gradient(x, g, *kernel, *window)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        x, g = ctx.saved_tensors
        need_x, need_g, _, _ = ctx.needs_input_grad
        w = contiguous_per_task(w)
        return (
            ConvDataGradient.apply(g, w, x.shape[2:4], ctx.window) if need_x else None,
            Conv.apply(x, w, None, ctx.window) if need_g else None,
            None,
            None,
        )


def _weight_gradient(ctx: Any, x: Tensor, g: Tensor) -> Tensor | None:
    """The gradient of `<g, x * w>` for the operand w of a Function; None if it is written."""
    to = destination(ctx, 1)
    kernel = ctx.saved_tensors[1].shape[3:]
    if to is None:
        gradient: Tensor = ConvWeightGradient.apply(x, g, kernel, ctx.window)
        return gradient
    if to.accumulate:
        to.part.add_(torch.ops.imaml.conv_weight_gradient(x, g, *kernel, *ctx.window))
    else:
        torch.ops.imaml.conv_weight_gradient_(to.part, x, g, *ctx.window)
    return None


class Patches(torch.autograd.Function):
    """The patches of x, [B, N H' W', C kH kW]: linear in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, window: Window) -> Any:
        ctx.geometry = x.shape[2:4], kernel, window
        return torch.ops.imaml.patches(x, *kernel, *window)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return PatchesTranspose.apply(g.contiguous(), *ctx.geometry), None, None


class PatchesTranspose(torch.autograd.Function):
    """The gradient of `<g, patches(x)>` with respect to x: linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, size: Pair, kernel: Pair, window: Window) -> Any:
        ctx.geometry = kernel, window
        return torch.ops.imaml.patches_transpose(g, *size, *kernel, *window)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        return Patches.apply(x.contiguous(), *ctx.geometry), None, None, None


class BatchedProduct(torch.autograd.Function):
    """`op(a) @ op(b)` for every task, where op transposes if requested.

    As `torch.bmm`, but the gradients have the memory layout of a and b, so they need no copy. With
    `own`, the extension's kernel computes it.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, own: bool
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.transposed, ctx.own = (transpose_a, transpose_b), own
        if own and _has_kernel(a, b):
            a, b = a.contiguous(), contiguous_per_task(b)
            product: Tensor = torch.ops.imaml.batched_product(a, b, transpose_a, transpose_b)
            return product
        return torch.bmm(a.mT if transpose_a else a, b.mT if transpose_b else b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        transpose_a, transpose_b = ctx.transposed
        need_a, need_b, *_ = ctx.needs_input_grad
        grad_a = grad_b = None
        if need_a and transpose_a:
            grad_a = batched_product(b, g, transpose_b, True, ctx.own)
        elif need_a:
            grad_a = batched_product(g, b, False, not transpose_b, ctx.own)
        if need_b and transpose_b:
            grad_b = batched_product(g, a, True, transpose_a, ctx.own)
        elif need_b:
            grad_b = batched_product(a, g, not transpose_a, False, ctx.own)
        return grad_a, grad_b, None, None, None


def _has_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel can replace `torch.bmm`: not in TF32 or under autocast."""
    if not a.numel() or not b.numel() or a.dtype != b.dtype:
        return False
    if torch.is_autocast_enabled(a.device.type):
        return False
    return a.dtype == torch.float64 or not a.is_cuda or _matmul.fp32_precision != "tf32"


_matmul: Any = torch.backends.cuda.matmul
batched_product: Callable[[Tensor, Tensor, bool, bool, bool], Tensor] = BatchedProduct.apply


class AddedBias(torch.autograd.Function):
    """y + bias, one bias per task, for y [B, R, C] and bias [B, C]: linear in both."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias[:, None]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        g = g.contiguous()
        return g, ChannelSums.apply(g) if ctx.needs_input_grad[1] else None


class ChannelSums(torch.autograd.Function):
    """The sums of g [B, R, C] over its rows, [B, C]: linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Any:
        ctx.shape = g.shape
        return torch.ops.imaml.channel_sums(g)

    @staticmethod
    def backward(ctx: Any, sums: Tensor) -> Tensor:
        return sums[:, None].expand(ctx.shape)


# The forms of `torch.nn.functional.conv2d`, for x [B, N, C, H, W] and one bias per task.


def direct_conv2d(x: Tensor, w: Tensor, bias: Tensor | None, *, window: Window) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y: Tensor = Conv.apply(channels_last(x), contiguous_per_task(w), bias, window)
    return channels_first(y)


def patches_conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, *, window: Window, own: bool = False
) -> Tensor:
    """With `own`, by batched_product and channel_sums instead of PyTorch's products and sums."""
    x, kernel = channels_last(x), w.shape[3:]
    y = batched_product(Patches.apply(x, kernel, window), w.flatten(2), False, True, own)
    if bias is not None:
        y = AddedBias.apply(y, bias) if own else y + bias[:, None]
    return channels_first(y.unflatten(1, (x.shape[1], *_output_size(x.shape[2:4], kernel, window))))


def _output_size(size: Sequence[int], kernel: Sequence[int], window: Window) -> Pair:
    stride_h, stride_w, pad_h, pad_w = window
    return (
        (size[0] + 2 * pad_h - kernel[0]) // stride_h + 1,
        (size[1] + 2 * pad_w - kernel[1]) // stride_w + 1,
    )


@fake("conv")
def _(x, w, bias, *window):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:2], *_output_size(x.shape[2:4], w.shape[3:], window), w.shape[1]))


@fake("conv_data_gradient")
def _(g, w, in_h, in_w, *window):  # type: ignore[no-untyped-def]
    return g.new_empty((*g.shape[:2], in_h, in_w, w.shape[2]))


@fake("conv_weight_gradient")
def _(x, g, kernel_h, kernel_w, *window):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], g.shape[4], x.shape[4], kernel_h, kernel_w))


@fake("conv_weight_gradient_")
def _(dw, x, g, *window):  # type: ignore[no-untyped-def]
    return None


@fake("batched_product")
def _(a, b, transpose_a, transpose_b):  # type: ignore[no-untyped-def]
    return a.new_empty((len(a), a.shape[2 if transpose_a else 1], b.shape[1 if transpose_b else 2]))


@fake("patches")
def _(x, kernel_h, kernel_w, *window):  # type: ignore[no-untyped-def]
    height, width = _output_size(x.shape[2:4], (kernel_h, kernel_w), window)
    rows, columns = x.shape[1] * height * width, x.shape[4] * kernel_h * kernel_w
    return x.new_empty((x.shape[0], rows, columns))


@fake("patches_transpose")
def _(g, in_h, in_w, kernel_h, kernel_w, *window):  # type: ignore[no-untyped-def]
    height, width = _output_size((in_h, in_w), (kernel_h, kernel_w), window)
    images, channels = g.shape[1] // (height * width), g.shape[2] // (kernel_h * kernel_w)
    return g.new_empty((g.shape[0], images, in_h, in_w, channels))


@fake("channel_sums")
def _(g):  # type: ignore[no-untyped-def]
    return g.new_empty((g.shape[0], g.shape[2]))
