"""Layers with one set of weights per task, for the vmapped forward pass.

Under `vmap` a convolution with batched weights becomes a grouped convolution, batch norm a dozen
passes over memory, and a linear layer a dozen operators. All are slow, and slower with every
derivative. Inside `task_layers()` the `conv2d`, `batch_norm` and `linear` calls of a vmapped
function run other operators instead, the first two those of this package.

On the CPU a convolution and its two gradients are three operators that are each other's
derivatives. On CUDA a convolution is a matrix product with patches: patches and their transpose are
each other's derivatives. Both forms can be differentiated to any order.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from imaml_ext._checks import check_choice
from imaml_ext.ops.batch_norm import batch_norm, batch_norm_relu
from imaml_ext.ops.batching import call_with_tasks, is_only_transform
from imaml_ext.ops.conv import Pair, direct_conv2d, patches_conv2d
from imaml_ext.ops.linear import linear
from imaml_ext.ops.vmap_forms import VmapForms


def task_layers(device: torch.device) -> AbstractContextManager[Any]:
    """The context for a vmapped forward pass on this device; includes `vmap_forms()`.

    The environment variable IMAML_LAYERS overrides the form, for comparison and debugging: "torch"
    for PyTorch's own layers, "patches" for CUDA's form on the CPU, "direct" for the CPU's form;
    "products" for CUDA's form with the extension's products, which have not run on a GPU yet.
    """
    name = os.environ.get("IMAML_LAYERS") or {"cpu": "direct", "cuda": "patches"}.get(device.type)
    if name is None or name == "torch":
        return VmapForms()
    check_choice("IMAML_LAYERS", name, ("torch", *_FORMS))
    if name == "direct" and device.type != "cpu":
        raise ValueError(f"IMAML_LAYERS=direct needs CPU tensors, the parameters are on {device}")
    return _TaskLayers(_FORMS[name])


_FORMS: dict[str, Callable[..., Tensor]] = {
    "direct": direct_conv2d,
    "patches": patches_conv2d,
    "products": partial(patches_conv2d, own=True),
}

_REAL = (torch.float32, torch.float64)

# These need the memory order of the dimensions, which channels-last images do not have.
_NEED_CONTIGUOUS = (torch.Tensor.view, torch.Tensor.view_as, F.group_norm, torch.group_norm)


class _TaskLayers(VmapForms):
    def __init__(self, conv2d: Callable[..., Tensor]) -> None:
        super().__init__()
        self._conv2d_form = conv2d
        self._previous: tuple[Any, ...] | None = None  # set if the last call was a batch norm

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        previous, self._previous = self._previous, None
        if function in _NEED_CONTIGUOUS and _have_tasks(args[0]):
            args = args[0].contiguous(), *args[1:]
        result = None
        if function is F.conv2d:
            result = self._conv2d(*args, **kwargs)
        elif function is F.batch_norm:
            result = self._batch_norm(*args, **kwargs)
        elif function is F.relu and previous is not None:
            result = self._relu(previous, *args, **kwargs)
        elif function in _FORMS_OF_TASKS:
            result = _FORMS_OF_TASKS[function](*args, **kwargs)
        if result is not None:
            return result
        if function is F.batch_norm and _have_tasks(args[0]):
            # On CUDA, vmap cannot ask whether images are in channels-last order.
            args = args[0].contiguous(), *args[1:]
        return super().__torch_function__(function, types, args, kwargs)

    # These have the signatures of the functions they replace, and return None to call the original.

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
            return None  # torch raises the error
        window = *_pair(stride), *_pair(padding)
        return call_with_tasks(partial(self._conv2d_form, window=window), input, weight, bias)

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
        # torch raises the errors: one value per channel, and other invalid arguments.
        if input.dim() < 2 or input.numel() <= input.shape[1] or eps <= 0:
            return None
        function = partial(batch_norm, eps=eps)
        y, positive, *statistics = call_with_tasks(function, input, weight, bias)
        version = _functorch.get_unwrapped(y)._version
        self._previous = y, (positive, input, weight, bias, *statistics), eps, version
        return y

    def _relu(self, previous: tuple[Any, ...], input: Tensor, inplace: bool = False) -> Any:
        y, operands, eps, version = previous
        if input is not y or inplace or not _have_tasks(input):
            return None
        if _functorch.get_unwrapped(input)._version != version:
            return None
        return call_with_tasks(partial(batch_norm_relu, eps=eps), *operands)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    shape, of_weight = input.shape, weight.shape
    if len(of_weight) != 2 or not shape or 0 in shape or not _have_tasks(input, weight, bias):
        return None
    if bias is not None and bias.shape != of_weight[:1]:
        return None  # torch broadcasts it, or raises the error
    return call_with_tasks(linear, input, weight, bias)


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Any:
    if size_average is not None or reduce is not None or reduction != "mean" or weight is not None:
        return None
    if input.shape != target.shape or input.dim() == 0 or not _have_tasks(input, target):
        return None
    return call_with_tasks(_mean_squared_error, input, target)


def _mean_squared_error(input: Tensor, target: Tensor) -> Tensor:
    squares: Tensor = torch.ops.aten.mse_loss(input, target, 0)  # F.mse_loss, reduction="none"
    return squares.mean(tuple(range(1, input.dim())))


_FORMS_OF_TASKS: dict[Any, Callable[..., Any]] = {F.linear: _linear, F.mse_loss: _mse_loss}


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, Sequence):
        return value[0], value[-1]
    return index(value), index(value)


def _have_tasks(first: Tensor, *others: Tensor | None) -> bool:
    """Whether vmap is the only active transform, and every tensor has a task dimension."""
    dtype = first.dtype
    if not is_only_transform() or dtype not in _REAL:
        return False
    if torch.is_autocast_enabled(first.device.type):
        return False
    for tensor in (first, *others):  # a loop is much faster here than all()
        if tensor is not None and not (
            _functorch.is_batchedtensor(tensor) and tensor.dtype == dtype
        ):
            return False
    return True
