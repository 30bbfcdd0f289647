"""Convolutions whose every sample has weights of its own, with their derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext.ops.batching import channels_last, tasks_contiguous
from imaml_ext.ops.extension import fake

Pair = tuple[int, int]
Window = tuple[int, int, int, int]


# A Function saves the very tensors that it was given: a contiguous copy made inside it would stand
# outside the graph, and the next derivative would miss it. So copies are made before.


class Conv(torch.autograd.Function):
    """x * w + bias: [B, N, H, W, C], [B, O, C, kH, kW] and [B, O] to [B, N, H', W', O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.window = window
        return conv(x, w, bias, window)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        to_x, to_w, to_bias, _ = ctx.needs_input_grad
        g = g.contiguous()
        return (
            ConvDataGradient.apply(g, w, x.shape[2:4], ctx.window) if to_x else None,
            ConvWeightGradient.apply(x, g, w.shape[3:], ctx.window) if to_w else None,
            g.sum((1, 2, 3)) if to_bias else None,
            None,
        )


class ConvDataGradient(torch.autograd.Function):
    """The gradient of `<g, x * w>` by x: linear in g and in w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, size: Pair, window: Window) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.window = window
        return conv_data_gradient(g, w, size, window)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        g, w = ctx.saved_tensors
        to_g, to_w, _, _ = ctx.needs_input_grad
        x = x.contiguous()
        return (
            Conv.apply(x, w, None, ctx.window) if to_g else None,
            ConvWeightGradient.apply(x, g, w.shape[3:], ctx.window) if to_w else None,
            None,
            None,
        )


class ConvWeightGradient(torch.autograd.Function):
    """The gradient of `<g, x * w>` by w: linear in x and in g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, kernel: Pair, window: Window) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.window = window
        return conv_weight_gradient(x, g, kernel, window)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        x, g = ctx.saved_tensors
        to_x, to_g, _, _ = ctx.needs_input_grad
        w = tasks_contiguous(w)
        return (
            ConvDataGradient.apply(g, w, x.shape[2:4], ctx.window) if to_x else None,
            Conv.apply(x, w, None, ctx.window) if to_g else None,
            None,
            None,
        )


class Patches(torch.autograd.Function):
    """The patches of x: [B, N, H, W, C] to [B, N H' W', C kH kW], linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, window: Window) -> Tensor:
        ctx.geometry = x.shape[2:4], kernel, window
        return patches(x, kernel, window)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return PatchesTranspose.apply(g.contiguous(), *ctx.geometry), None, None


class PatchesTranspose(torch.autograd.Function):
    """The gradient of `<g, patches(x)>` by x: linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, size: Pair, kernel: Pair, window: Window) -> Tensor:
        ctx.geometry = kernel, window
        return patches_transpose(g, size, kernel, window)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        return Patches.apply(x.contiguous(), *ctx.geometry), None, None, None


class Product(torch.autograd.Function):
    """`op(a) @ op(b)` of every task, where op transposes if asked.

    As `torch.bmm`, but the gradients lie as a and b do, so that none has to be copied.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.transposed = transpose_a, transpose_b
        return torch.bmm(a.mT if transpose_a else a, b.mT if transpose_b else b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.transposed
        to_a, to_b, _, _ = ctx.needs_input_grad
        slope_a = slope_b = None
        if to_a:
            slope_a = product(b, g, of_b, True) if of_a else product(g, b, False, not of_b)
        if to_b:
            slope_b = product(g, a, True, of_a) if of_b else product(a, g, not of_a, False)
        return slope_a, slope_b, None, None


product: Callable[[Tensor, Tensor, bool, bool], Tensor] = Product.apply


def conv2d(x: Tensor, w: Tensor, bias: Tensor | None, *, window: Window) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y: Tensor = Conv.apply(channels_last(x), tasks_contiguous(w), bias, window)
    return y.permute(0, 1, 4, 2, 3)


def conv2d_of_patches(x: Tensor, w: Tensor, bias: Tensor | None, *, window: Window) -> Tensor:
    x = channels_last(x)
    kernel = w.shape[3:]
    y = product(Patches.apply(x, kernel, window), w.flatten(2), False, True)
    if bias is not None:
        y = y + bias[:, None]
    height, width = (
        (x.shape[side + 2] + 2 * window[side + 2] - kernel[side]) // window[side] + 1
        for side in (0, 1)
    )
    images: Tensor = y.unflatten(1, (x.shape[1], height, width))
    return images.permute(0, 1, 4, 2, 3)


@fake("conv")
def _(x, w, bias, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    height = (x.shape[2] + 2 * pad_h - w.shape[3]) // stride_h + 1
    width = (x.shape[3] + 2 * pad_w - w.shape[4]) // stride_w + 1
    return x.new_empty((*x.shape[:2], height, width, w.shape[1]))


@fake("conv_data_gradient")
def _(g, w, in_h, in_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    return g.new_empty((*g.shape[:2], in_h, in_w, w.shape[2]))


@fake("conv_weight_gradient")
def _(x, g, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], g.shape[4], x.shape[4], kernel_h, kernel_w))


@fake("patches")
def _(x, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    height = (x.shape[2] + 2 * pad_h - kernel_h) // stride_h + 1
    width = (x.shape[3] + 2 * pad_w - kernel_w) // stride_w + 1
    rows, columns = x.shape[1] * height * width, x.shape[4] * kernel_h * kernel_w
    return x.new_empty((x.shape[0], rows, columns))


@fake("patches_transpose")
def _(g, in_h, in_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    height = (in_h + 2 * pad_h - kernel_h) // stride_h + 1
    width = (in_w + 2 * pad_w - kernel_w) // stride_w + 1
    images, channels = g.shape[1] // (height * width), g.shape[2] // (kernel_h * kernel_w)
    return g.new_empty((g.shape[0], images, in_h, in_w, channels))


def conv(x: Tensor, w: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Convolutions of B tasks, each with its own weights, on the CPU.

    Args:
        x: images, [B, N, H, W, C].
        w: weights, [B, O, C, kH, kW]; contiguous within each task.
        bias: added to every pixel, [B, O].
        window: strides and paddings, (sH, sW, pH, pW).

    Returns:
        [B, N, H', W', O], `H' = (H + 2 pH - kH) // sH + 1`.

    Raises:
        RuntimeError: a shape, dtype or layout does not fit; an operand is empty.
    """
    y: Tensor = torch.ops.imaml.conv(x, w, bias, *window)
    return y


def conv_data_gradient(g: Tensor, w: Tensor, size: Pair, window: Window) -> Tensor:
    """The gradient of `<g, conv(x, w)>` by x, [B, N, H, W, C].

    Args:
        g: like what `conv` returns.
        w, window: as in `conv`.
        size: (H, W).

    Raises:
        RuntimeError: as `conv`.
    """
    x: Tensor = torch.ops.imaml.conv_data_gradient(g, w, *size, *window)
    return x


def conv_weight_gradient(x: Tensor, g: Tensor, kernel: Pair, window: Window) -> Tensor:
    """The gradient of `<g, conv(x, w)>` by w, [B, O, C, kH, kW].

    Args:
        x, window: as in `conv`.
        g: like what `conv` returns.
        kernel: (kH, kW).

    Raises:
        RuntimeError: as `conv`.
    """
    w: Tensor = torch.ops.imaml.conv_weight_gradient(x, g, *kernel, *window)
    return w


def patches(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """What a convolution's window sees of each image, as the rows of a matrix, one matrix a task.

    With `w` [B, O, C, kH, kW], `patches(x, ...) @ w.flatten(2).mT` is the convolution of x.

    Args:
        x: images, [B, N, H, W, C].
        kernel: (kH, kW).
        window: as in `conv`.

    Returns:
        [B, N H' W', C kH kW], 0 outside of an image; H', W' as in `conv`.

    Raises:
        RuntimeError: as `conv`.
    """
    rows: Tensor = torch.ops.imaml.patches(x, *kernel, *window)
    return rows


def patches_transpose(g: Tensor, size: Pair, kernel: Pair, window: Window) -> Tensor:
    """The gradient of `<g, patches(x)>` by x, [B, N, H, W, C].

    Args:
        g: like what `patches` returns.
        size: (H, W).
        kernel, window: as in `patches`.

    Raises:
        RuntimeError: as `conv`.
    """
    x: Tensor = torch.ops.imaml.patches_transpose(g, *size, *kernel, *window)
    return x
