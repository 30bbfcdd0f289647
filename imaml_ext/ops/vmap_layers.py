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
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from imaml_ext.ops.batch_norm import batch_norm_relu, vmap_batch_norm
from imaml_ext.ops.batching import for_tasks
from imaml_ext.ops.conv import (
    Pair,
    conv2d,
    conv2d_of_patches,
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


class _Form(NamedTuple):
    conv2d: Callable[..., Tensor]
    positive: bool  # batch norm writes what a ReLU behind it gives, which costs less than a launch


_FORMS = {"direct": _Form(conv2d, False), "patches": _Form(conv2d_of_patches, True)}


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
        return for_tasks(partial(self._form.conv2d, window=window), input, weight, bias)

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
        of_tasks = partial(vmap_batch_norm, eps=eps, positive=self._form.positive)
        y, positive, *statistics = for_tasks(of_tasks, input, weight, bias)
        version = _functorch.get_unwrapped(y)._version
        self._normalised = (y, positive, input, weight, bias, *statistics), eps, version
        return y

    def _relu(self, normalised: tuple[Any, ...], input: Tensor, inplace: bool = False) -> Any:
        operands, eps, version = normalised
        if input is not operands[0] or inplace or not _have_tasks(input):
            return None
        if _functorch.get_unwrapped(input)._version != version:
            return None
        return for_tasks(partial(batch_norm_relu, eps=eps), *operands)


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
