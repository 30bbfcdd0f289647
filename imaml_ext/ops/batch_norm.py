"""Batch norm over rows, with its derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext.ops.batching import tasks_contiguous
from imaml_ext.ops.extension import fake


class BatchNorm(torch.autograd.Function):
    """Batch norm over the rows of each task: x [B, R, C], gamma and beta [B, C].

    Also gives, outside the graph, its positive part or an empty tensor, and the mean and the
    inverse root of the variance, [B, C].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, positive: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, positive_part, mean, scale = batch_norm(x, gamma, beta, eps, positive)
        ctx.save_for_backward(x, gamma, beta, mean, scale)
        ctx.mark_non_differentiable(positive_part, mean, scale)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return y, positive_part, mean, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> Any:
        slopes = BatchNormBackward.apply(g.contiguous(), *ctx.saved_tensors, ctx.eps, False)
        return *slopes, None, None


class BatchNormReLU(torch.autograd.Function):
    """The positive part of the batch norm of x, in the graph of x: what `relu()` returns."""

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
        slopes = BatchNormBackward.apply(g.contiguous(), *ctx.saved_tensors, ctx.eps, True)
        return None, *slopes, None, None, None


class BatchNormBackward(torch.autograd.Function):
    """The gradients of `<g, batch_norm(x)>` by x, gamma and beta; mean and scale are x's."""

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
        return batch_norm_backward(g, x, gamma, beta, mean, scale, relu)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Any:
        g, x, gamma, beta, mean, scale = ctx.saved_tensors
        eps, relu = ctx.settings
        if torch.is_grad_enabled():
            slopes = _batch_norm_double_backward(a, b, c, g, x, gamma, beta, eps, relu)
        else:
            cotangents = a.contiguous(), tasks_contiguous(b), tasks_contiguous(c)
            operands = g, x, gamma, beta, mean, scale
            slopes = batch_norm_double_backward(*cotangents, *operands, relu)
        return *slopes, None, None, None, None, None


def _batch_norm_double_backward(
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
    """What `batch_norm_double_backward` computes, in torch's operators: a graph of any order."""

    def mean(u: Tensor) -> Tensor:
        return u.mean(1, keepdim=True)

    b, c, gamma, beta = b[:, None], c[:, None], gamma[:, None], beta[:, None]
    x_centered = x - mean(x)
    scale = (mean(x_centered * x_centered) + eps).rsqrt()
    h = x_centered * scale
    passes = (gamma * h + beta > 0).to(x.dtype) if relu else 1.0

    def centre(u: Tensor) -> Tensor:
        return u - mean(u) - mean(h * u) * h

    g = g * passes
    slope, pa, pg = gamma * scale, centre(a), centre(g)
    apg = mean(a * pg)
    to_x = (b - slope * mean(h * a)) * pg - slope * (mean(h * g) * pa + apg * h)
    to_gamma = x.shape[1] * scale * apg
    return (slope * pa + b * h + c) * passes, to_x * scale, to_gamma[:, 0]


def vmap_batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, positive: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = tasks_contiguous(gamma), tasks_contiguous(beta)
    y, *others = BatchNorm.apply(_rows(x), *own, eps, positive)
    return _images(y, x), *others


def batch_norm_relu(
    y: Tensor,
    positive: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    scale: Tensor,
    *,
    eps: float,
) -> Tensor:
    own = tasks_contiguous(gamma), tasks_contiguous(beta)
    arguments = _rows(x), *own, mean, scale, eps
    rows = _rows(y.detach())

    def relu() -> Tensor:
        return positive.detach() if positive.numel() else rows.relu()

    return _images(BatchNormReLU.apply(relu, *arguments), x)


def _rows(x: Tensor) -> Tensor:
    """[B, N H W, C] from [B, N, C, H, W], whatever the number of dimensions after C."""
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


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gamma h + beta` with `h = (x - mean) scale` over the rows of each task.

    Args:
        x: [B, R, C].
        gamma, beta: [B, C]; contiguous within each task.
        eps: added to the variance, of which `scale` is the inverse root.
        relu: also give the positive part.

    Returns:
        The result, like x, its positive part, like x or empty, and mean and scale, [B, C].

    Raises:
        RuntimeError: a shape, dtype or layout does not fit; an operand is empty.
    """
    y, positive, mean, scale = torch.ops.imaml.batch_norm(x, gamma, beta, eps, relu)
    return y, positive, mean, scale


def batch_norm_backward(
    g: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, scale: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `<g, y>` by x, gamma and beta, y what `batch_norm` gives for them.

    Args:
        g: like y.
        x, gamma, beta, mean, scale: what `batch_norm` took and gave.
        relu: of `<g, max(y, 0)>` instead.

    Returns:
        [B, R, C], [B, C] and [B, C].

    Raises:
        RuntimeError: as `batch_norm`.
    """
    dx, dgamma, dbeta = torch.ops.imaml.batch_norm_backward(g, x, gamma, beta, mean, scale, relu)
    return dx, dgamma, dbeta


def batch_norm_double_backward(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    scale: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `<(a, b, c), batch_norm_backward(g, x, gamma)>` by g, x and gamma.

    Args:
        a, b, c: like the three that `batch_norm_backward` returns; b and c contiguous within each
            task.
        g, x, gamma, beta, mean, scale, relu: as in `batch_norm_backward`.

    Returns:
        [B, R, C], [B, R, C] and [B, C].

    Raises:
        RuntimeError: as `batch_norm`.
    """
    to_g, to_x, to_gamma = torch.ops.imaml.batch_norm_double_backward(
        a, b, c, g, x, gamma, beta, mean, scale, relu
    )
    return to_g, to_x, to_gamma
