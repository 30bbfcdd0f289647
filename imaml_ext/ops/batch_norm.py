"""Batch norm over the rows of each task, with derivatives of any order.

Shapes are those of `csrc/schemas.cpp`: x [B, R, C], gamma, beta, mean and scale [B, C]. `scale` is
`1 / sqrt(variance + eps)`. `csrc/norm_formulas.h` has the formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext.ops.batching import contiguous_per_task
from imaml_ext.ops.extension import fake


class BatchNorm(torch.autograd.Function):
    """`gamma (x - mean) scale + beta`.

    Also returns, outside the graph, its positive part, mean and scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # One more write costs less than a pass of its own for the ReLU that usually follows.
        y, positive, mean, scale = torch.ops.imaml.batch_norm(x, gamma, beta, eps, True)
        ctx.save_for_backward(x, gamma, beta, mean, scale)
        ctx.mark_non_differentiable(positive, mean, scale)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return y, positive, mean, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> Any:
        grads = BatchNormBackward.apply(g.contiguous(), *ctx.saved_tensors, ctx.eps, False)
        return *grads, None


class BatchNormReLU(torch.autograd.Function):
    """The positive part of the batch norm of x, in the graph of x. Its value is `relu()`."""

    @staticmethod
    def forward(
        ctx: Any,
        relu: Callable[[], Tensor],
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        scale: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, beta, mean, scale)
        ctx.eps = eps
        return relu()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        grads = BatchNormBackward.apply(g.contiguous(), *ctx.saved_tensors, ctx.eps, True)
        return None, *grads, None, None, None


class BatchNormBackward(torch.autograd.Function):
    """The gradients of `<g, batch_norm(x)>` with respect to x, gamma and beta.

    With `relu`, of `<g, max(batch_norm(x), 0)>`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        scale: Tensor,
        eps: float,
        relu: bool,
    ) -> Any:
        ctx.save_for_backward(g, x, gamma, beta, mean, scale)
        ctx.settings = eps, relu
        return torch.ops.imaml.batch_norm_backward(g, x, gamma, beta, mean, scale, relu)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Any:
        g, x, gamma, beta, mean, scale = ctx.saved_tensors
        eps, relu = ctx.settings
        if torch.is_grad_enabled():
            grads = differentiable_double_backward(a, b, c, g, x, gamma, beta, eps, relu)
        else:
            cotangents = a.contiguous(), contiguous_per_task(b), contiguous_per_task(c)
            grads = torch.ops.imaml.batch_norm_double_backward(
                *cotangents, g, x, gamma, beta, mean, scale, relu
            )
        return *grads, None, None, None, None, None


def differentiable_double_backward(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.imaml.batch_norm_double_backward` in PyTorch's operators, for higher orders."""

    def mean(u: Tensor) -> Tensor:
        return u.mean(1, keepdim=True)

    b, c, gamma, beta = b[:, None], c[:, None], gamma[:, None], beta[:, None]
    x_centred = x - mean(x)
    scale = (mean(x_centred * x_centred) + eps).rsqrt()
    h = x_centred * scale
    mask = (gamma * h + beta > 0).to(x.dtype) if relu else 1.0

    def project(u: Tensor) -> Tensor:
        return u - mean(u) - mean(h * u) * h

    g = g * mask
    factor, pa, pg = gamma * scale, project(a), project(g)
    apg = mean(a * pg)
    grad_x = (b - factor * mean(h * a)) * pg - factor * (mean(h * g) * pa + apg * h)
    grad_gamma = x.shape[1] * scale * apg
    return (factor * pa + b * h + c) * mask, grad_x * scale, grad_gamma[:, 0]


# `torch.nn.functional.batch_norm` and `relu`, for x [B, N, C, ...].


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x, then its positive part as rows, mean and scale."""
    parameters = contiguous_per_task(gamma), contiguous_per_task(beta)
    y, *others = BatchNorm.apply(_rows(x), *parameters, eps)
    return _images(y, x), *others


def batch_norm_relu(
    positive: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    scale: Tensor,
    *,
    eps: float,
) -> Tensor:
    """The ReLU of y; `y, positive, mean, scale = batch_norm(x, gamma, beta)`."""
    parameters = contiguous_per_task(gamma), contiguous_per_task(beta)
    relu = positive.detach  # called inside the Function: its result is not one of the inputs
    return _images(BatchNormReLU.apply(relu, _rows(x), *parameters, mean, scale, eps), x)


def _rows(x: Tensor) -> Tensor:
    """[B, N H W, C] from [B, N, C, H, W], for any number of dimensions after C."""
    return x.movedim(2, -1).reshape(x.shape[0], -1, x.shape[2]).contiguous()


def _images(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(like.movedim(2, -1).shape).movedim(-1, 2)


@fake("batch_norm")
def _(x, gamma, beta, eps, relu):  # type: ignore[no-untyped-def]
    positive = torch.empty_like(x) if relu else x.new_empty(0)
    channels = x.shape[0], x.shape[2]
    return torch.empty_like(x), positive, x.new_empty(channels), x.new_empty(channels)


@fake("batch_norm_backward")
def _(g, x, gamma, beta, mean, scale, relu):  # type: ignore[no-untyped-def]
    channels = x.shape[0], x.shape[2]
    return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)


@fake("batch_norm_double_backward")
def _(a, b, c, g, x, gamma, beta, mean, scale, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]))
