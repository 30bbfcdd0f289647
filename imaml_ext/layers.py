"""Layers in which every task has its own weights, for the forward pass that `Objective` vmaps.

Under `vmap` a convolution with batched weights becomes a grouped convolution, and batch norm a
dozen passes over memory. Both are slow, and slower with each derivative. Inside `task_layers()`,
`conv2d` and `batch_norm` calls of a vmapped function run this package's operators instead.

A convolution is bilinear. On the CPU it and its two gradients are each other's derivatives, so
three operators can be differentiated to any order. On CUDA it is a matrix product with the patches
that the window sees: patches and their transpose are each other's derivatives, and of the products
autograd knows all.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
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
    patches,
    patches_transpose,
)


def task_layers(device: torch.device) -> AbstractContextManager[Any]:
    """What to run a vmapped forward pass in, on this device.

    IMAML_LAYERS in the environment chooses another form, to compare and to debug: "torch" for
    PyTorch's own layers, "patches" for CUDA's form on the CPU too, "direct" for the CPU's.
    """
    name = os.environ.get("IMAML_LAYERS") or {"cpu": "direct", "cuda": "patches"}.get(device.type)
    if name is None or name == "torch":
        return nullcontext()
    if name not in _FORMS:
        raise ValueError(f"IMAML_LAYERS must be torch, {' or '.join(_FORMS)}, got {name!r}")
    if name == "direct" and device.type != "cpu":
        raise ValueError(f"IMAML_LAYERS=direct is for the CPU, the parameters are on {device}")
    return _TaskLayers(_FORMS[name])


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
        w = _tasks_contiguous(w)
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
            cotangents = a.contiguous(), _tasks_contiguous(b), _tasks_contiguous(c)
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
    away = x - mean(x)
    scale = (mean(away * away) + eps).rsqrt()
    h = away * scale
    passes = (gamma * h + beta > 0).to(x.dtype) if relu else 1.0

    def centre(u: Tensor) -> Tensor:
        return u - mean(u) - mean(h * u) * h

    g = g * passes
    slope, pa, pg = gamma * scale, centre(a), centre(g)
    apg = mean(a * pg)
    to_x = (b - slope * mean(h * a)) * pg - slope * (mean(h * g) * pa + apg * h)
    to_gamma = x.shape[1] * scale * apg
    return (slope * pa + b * h + c) * passes, to_x * scale, to_gamma[:, 0]


def _for_tasks(function: Callable[..., Any], *operands: Tensor | None) -> Any:
    """`function(*operands)` of a vmapped function's operands, their task dimensions in front.

    As `torch.autograd.Function.vmap` would have it, whose dispatch costs more than a small layer.
    """
    level: Any = _functorch.maybe_current_level()
    with retrieve_current_functorch_interpreter().lower():
        result = function(*(None if t is None else _tasks_in_front(t) for t in operands))
    if isinstance(result, tuple):
        return tuple(_functorch._add_batch_dim(t, 0, level) for t in result)
    return _functorch._add_batch_dim(result, 0, level)


def _tasks_in_front(batched: Tensor) -> Tensor:
    return _functorch.get_unwrapped(batched).movedim(_functorch.maybe_get_bdim(batched), 0)


def _conv2d(x: Tensor, w: Tensor, bias: Tensor | None, *, window: Window) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y: Tensor = Conv.apply(_channels_last(x), _tasks_contiguous(w), bias, window)
    return y.permute(0, 1, 4, 2, 3)


def _conv2d_of_patches(x: Tensor, w: Tensor, bias: Tensor | None, *, window: Window) -> Tensor:
    x = _channels_last(x)
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


class _Form(NamedTuple):
    conv2d: Callable[..., Tensor]
    positive: bool  # batch norm writes what a ReLU behind it gives, which costs less than a launch


_FORMS = {"direct": _Form(_conv2d, False), "patches": _Form(_conv2d_of_patches, True)}


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous()


def _tasks_contiguous(t: Tensor) -> Tensor:
    """As parameters lie in the rows of all parameters, where those of each task are contiguous."""
    return t if t[0].is_contiguous() else t.contiguous()


def _batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, positive: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = _tasks_contiguous(gamma), _tasks_contiguous(beta)
    y, *others = BatchNorm.apply(_rows(x), *own, eps, positive)
    return _images(y, x), *others


def _batch_norm_relu(
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
    own = _tasks_contiguous(gamma), _tasks_contiguous(beta)
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


_WANT_CONTIGUOUS = (torch.Tensor.view, torch.Tensor.view_as, F.group_norm, torch.group_norm)


class _TaskLayers(TorchFunctionMode):
    def __init__(self, form: _Form) -> None:
        super().__init__()
        self._form = form
        self._normalised: tuple[Any, ...] | None = None  # by the call just before, if it was one

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before, self._normalised = self._normalised, None
        if function in _WANT_CONTIGUOUS and _have_tasks(args[0]):
            args = args[0].contiguous(), *args[1:]  # of images whose channels lie together
        result = None
        if function is F.conv2d:
            result = self._conv2d(*args, **kwargs)
        elif function is F.batch_norm:
            result = self._batch_norm(*args, **kwargs)
        elif function is F.relu and before is not None:
            result = self._relu(before, *args, **kwargs)
        return function(*args, **kwargs) if result is None else result

    # Each takes what the function takes, and gives None where the function itself is to be called.

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(padding, str) or groups != 1 or _pair(dilation) != (1, 1):
            return None
        if input.dim() != 4 or input.numel() == 0 or not _have_tasks(input, weight, bias):
            return None
        if input.shape[1] != weight.shape[1]:
            return None  # torch has a message for it
        window = *_pair(stride), *_pair(padding)
        return _for_tasks(partial(self._form.conv2d, window=window), input, weight, bias)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if not training or running_mean is not None or running_var is not None:
            return None
        if weight is None or bias is None or not _have_tasks(input, weight, bias):
            return None
        # torch has messages for one value a channel, and for what else cannot be.
        if input.dim() < 2 or input.numel() <= input.shape[1] or eps <= 0:
            return None
        of_tasks = partial(_batch_norm, eps=eps, positive=self._form.positive)
        y, positive, *statistics = _for_tasks(of_tasks, input, weight, bias)
        version = _functorch.get_unwrapped(y)._version
        self._normalised = (y, positive, input, weight, bias, *statistics), eps, version
        return y

    def _relu(self, normalised: tuple[Any, ...], input: Tensor, inplace: bool = False) -> Any:
        operands, eps, version = normalised
        if input is not operands[0] or inplace or not _have_tasks(input):
            return None
        if _functorch.get_unwrapped(input)._version != version:
            return None
        return _for_tasks(partial(_batch_norm_relu, eps=eps), *operands)


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, Sequence):
        return value[0], value[-1]
    return index(value), index(value)


def _have_tasks(*tensors: Tensor | None) -> bool:
    """Whether vmap is the only transform under way, and each tensor has a task dimension."""
    return (
        _functorch.maybe_current_level() == 1
        and forward_ad._current_level < 0
        and all(t is None or _functorch.is_batchedtensor(t) for t in tensors)
        and {t.dtype for t in tensors if t is not None} in ({torch.float32}, {torch.float64})
        and not any(torch.is_autocast_enabled(t.device.type) for t in tensors if t is not None)
    )
