"""Layers in which every task has its own weights, for the forward pass that `Objective` vmaps.

Under `vmap` a convolution with batched weights becomes a grouped convolution, and batch norm a
dozen passes over memory. Both are slow on the CPU, and slower with each derivative. Inside
`task_layers()`, `conv2d` and `batch_norm` calls of a vmapped function run this package's operators
instead. A convolution is bilinear: it and its two gradients are each other's derivatives, so three
operators can be differentiated to any order.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from imaml_ext.ops import (
    Pair,
    Window,
    batch_norm,
    batch_norm_backward,
    batch_norm_double_backward,
    conv,
    conv_data_gradient,
    conv_weight_gradient,
)

def task_layers(device: torch.device) -> AbstractContextManager[Any]:
    """What to run a vmapped forward pass in, on this device."""
    return _TaskLayers() if device.type == "cpu" else nullcontext()


# A Function saves the very tensors that it was given: a contiguous copy made inside it would stand
# outside the graph, and the next derivative would miss it. So copies are made before.


class Conv(torch.autograd.Function):
    """x * w, task by task: [B, N, H, W, C] and [B, O, C, kH, kW] to [B, N, H', W', O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, window: Window) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.window = window
        return conv(x, w, window)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        to_x, to_w, _ = ctx.needs_input_grad
        g = g.contiguous()
        return (
            ConvDataGradient.apply(g, w, x.shape[2:4], ctx.window) if to_x else None,
            ConvWeightGradient.apply(x, g, w.shape[3:], ctx.window) if to_w else None,
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
            Conv.apply(x, w, ctx.window) if to_g else None,
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
        w = w.contiguous()
        return (
            ConvDataGradient.apply(g, w, x.shape[2:4], ctx.window) if to_x else None,
            Conv.apply(x, w, ctx.window) if to_g else None,
            None,
            None,
        )


class BatchNorm(torch.autograd.Function):
    """Batch norm over the rows of each task: x [B, R, C], gamma and beta [B, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        y, mean, scale = batch_norm(x, gamma, beta, eps)
        ctx.save_for_backward(x, gamma, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *BatchNormBackward.apply(g.contiguous(), *ctx.saved_tensors, ctx.eps), None


class BatchNormBackward(torch.autograd.Function):
    """The gradients of `<g, batch_norm(x)>` by x, gamma and beta; mean and scale are x's."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> Any:
        ctx.save_for_backward(g, x, gamma, mean, scale)
        ctx.eps = eps
        return batch_norm_backward(g, x, gamma, mean, scale)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Any:
        g, x, gamma, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            slopes = _batch_norm_double_backward(a, b, c, g, x, gamma, ctx.eps)
        else:
            cotangents = a.contiguous(), b.contiguous(), c.contiguous()
            slopes = batch_norm_double_backward(*cotangents, g, x, gamma, mean, scale)
        return *slopes, None, None, None


def _batch_norm_double_backward(
    a: Tensor, b: Tensor, c: Tensor, g: Tensor, x: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `batch_norm_double_backward` computes, in torch's operators: a graph of any order."""

    def mean(u: Tensor) -> Tensor:
        return u.mean(1, keepdim=True)

    b, c, gamma = b[:, None], c[:, None], gamma[:, None]
    away = x - mean(x)
    scale = (mean(away * away) + eps).rsqrt()
    h = away * scale

    def centre(u: Tensor) -> Tensor:
        return u - mean(u) - mean(h * u) * h

    slope, pa, pg = gamma * scale, centre(a), centre(g)
    apg = mean(a * pg)
    to_x = (b - slope * mean(h * a)) * pg - slope * (mean(h * g) * pa + apg * h)
    to_gamma = x.shape[1] * scale * apg
    return slope * pa + b * h + c, to_x * scale, to_gamma[:, 0]


class _TaskConv2d(torch.autograd.Function):
    """`conv2d`, and how it is vmapped."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        return F.conv2d(x, w, bias, window[:2], window[2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, w: Tensor, bias: Tensor | None, window: Window
    ) -> tuple[Tensor, int]:
        x, w = x.movedim(in_dims[0], 0), w.movedim(in_dims[1], 0)
        y = Conv.apply(x.permute(0, 1, 3, 4, 2).contiguous(), w.contiguous(), window)
        if bias is not None:
            y = y + bias.movedim(in_dims[2], 0)[:, None, None, None]
        return y.permute(0, 1, 4, 2, 3), 0


class _TaskBatchNorm(torch.autograd.Function):
    """`batch_norm` by the statistics of the batch, and how it is vmapped."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0).movedim(2, -1)
        gamma, beta = gamma.movedim(in_dims[1], 0), beta.movedim(in_dims[2], 0)
        rows = x.reshape(x.shape[0], -1, x.shape[-1]).contiguous()
        y = BatchNorm.apply(rows, gamma.contiguous(), beta.contiguous(), eps)
        return y.reshape(x.shape).movedim(-1, 2), 0


class _TaskLayers(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(function)
        replaced = rule(*args, **kwargs) if rule else None
        return function(*args, **kwargs) if replaced is None else replaced


def _conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str) or groups != 1 or _pair(dilation) != (1, 1) or x.dim() != 4:
        return None
    if not _is_for_tasks(x, w) or (bias is not None and not _is_for_tasks(bias)):
        return None
    result: Tensor = _TaskConv2d.apply(x, w, bias, (*_pair(stride), *_pair(padding)))
    return result


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not training or running_mean is not None or running_var is not None:
        return None
    if weight is None or bias is None or not _is_for_tasks(x, weight, bias):
        return None
    if x.numel() == x.shape[1]:  # one value a channel: torch has a message for that
        return None
    result: Tensor = _TaskBatchNorm.apply(x, weight, bias, eps)
    return result


_RULES: dict[Any, Callable[..., Tensor | None]] = {F.conv2d: _conv2d, F.batch_norm: _batch_norm}


def _pair(value: int | Iterable[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return (first, *rest) if rest else (first, first)


def _is_for_tasks(*tensors: Tensor) -> bool:
    """Whether each has a task dimension and no transform but that vmap is under way."""
    return (
        _functorch.maybe_current_level() == 1
        and all(_functorch.is_batchedtensor(t) for t in tensors)
        and len({t.dtype for t in tensors} - {torch.float32, torch.float64}) == 0
        and not torch.is_autocast_enabled("cpu")
    )
