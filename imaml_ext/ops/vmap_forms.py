"""Functions that PyTorch cannot vmap, or vmaps wrongly, in forms that it vmaps.

Values and derivatives of each task are those of the original. Inside `vmap_forms()` they replace
PyTorch's functions, on every device.
"""

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from imaml_ext.ops import recurrent
from imaml_ext.ops.attention import attention, multi_head_attention
from imaml_ext.ops.batching import call_with_tasks
from imaml_ext.ops.parametrizations import uncached

_warn_of_loops: Callable[[bool], None] = _functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]


class VmapForms(TorchFunctionMode):
    """The context in which the forms are used.

    In it vmap does not warn that it loops over the tasks for an operator. The results are right,
    the warning would appear at every evaluation, and where warnings are errors it would stop the
    run.
    """

    _entered = threading.local()

    def __init__(self) -> None:
        super().__init__()
        self._uncached = uncached()

    def __enter__(self) -> Any:
        self._entered.depth = self.depth() + 1
        self._uncached.__enter__()
        _warn_of_loops(False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.depth -= 1
        self._uncached.__exit__(*error)
        _warn_of_loops(self.depth() == 0)
        super().__exit__(*error)

    @classmethod
    def depth(cls) -> int:
        """How many of these contexts this thread is in."""
        return getattr(cls._entered, "depth", 0)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            TorchFunctionMode.__enter__(self)  # for the functions that it calls
            try:
                return multi_head_attention(*args, **kwargs)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)
        result = FORMS[function](*args, **kwargs) if function in FORMS else None
        return function(*args, **kwargs) if result is None else result


def vmap_forms() -> AbstractContextManager[Any]:
    """The context of the forms inside a transform of `torch.func`, unless it is entered already."""
    if _functorch.maybe_current_level() is None or VmapForms.depth():
        return nullcontext()
    return VmapForms()


# These have the signatures of the functions they replace, and return None to call the original.


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """vmap applies padding_idx to the first task only, and cannot reshape sparse gradients."""
    if max_norm is not None:
        raise ValueError(
            "an embedding with max_norm writes to its weight: construct it without, and multiply "
            "what it returns by (max_norm / norm).clamp(max=1)"
        )
    if scale_grad_by_freq:
        raise ValueError(
            "the gradient of an embedding with scale_grad_by_freq=True is not the derivative of "
            "the loss: construct it without"
        )
    count = weight.shape[0]
    if padding_idx is None or not -count <= padding_idx < count:
        return F.embedding(input, weight) if sparse and padding_idx is None else None
    rows = F.embedding(input, weight)
    return torch.where((input == padding_idx % count).unsqueeze(-1), rows.detach(), rows)


def _aten_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    padding = padding_idx if padding_idx >= 0 else None
    return _embedding(indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """With class weights and label smoothing, torch selects the targets that are not ignored."""
    if weight is None or not 0 < label_smoothing <= 1:
        return None
    if target.is_floating_point() or input.dim() != target.dim() + 1:
        return None
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    classes = 0 if input.dim() == 1 else 1
    count = input.shape[classes]
    log_p = F.log_softmax(input, classes)
    ignored = target == ignore_index
    shape = [1] * input.dim()
    shape[classes] = count
    smooth = -(log_p * weight.view(shape)).sum(classes).masked_fill(ignored, 0.0)
    if reduction == "mean":
        index = target.masked_fill(ignored, 0)
        weights = weight.index_select(0, index.flatten()).view_as(index).masked_fill(ignored, 0.0)
        smooth = smooth.sum() / weights.sum()
    elif reduction == "sum":
        smooth = smooth.sum()
    nll = F.nll_loss(log_p, target, weight, ignore_index=ignore_index, reduction=reduction)
    return (1 - label_smoothing) * nll + label_smoothing / count * smooth


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Any:
    """A negative variance gives NaN: torch's check for it would need the values of all tasks."""
    if reduction not in ("none", "mean", "sum"):
        return None
    if not isinstance(var, Tensor):
        if var < 0:
            return None
        var = torch.full_like(input, var)
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif (
            input.dim() != var.dim()
            or sum(v for i, v in zip(input.shape, var.shape, strict=True) if i != v) != 1
        ):
            raise ValueError("var is of incorrect size")
    # As in torch, the derivative by a clamped variance is that at eps, not 0.
    clamped = torch.where(var < eps, var - var.detach() + eps, var)
    clamped = torch.where(var < 0, torch.nan, clamped)
    loss = 0.5 * (clamped.log() + (input - target) ** 2 / clamped)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss if reduction == "none" else getattr(loss, reduction)()


def _setitem(tensor: Tensor, index: Any, value: Any) -> Any:
    """`tensor[mask] = number`; torch returns None as well."""
    if not (isinstance(index, Tensor) and _functorch.is_batchedtensor(index)):
        return None
    if index.dtype != torch.bool or (isinstance(value, Tensor) and value.dim() > 0):
        return None
    if not _functorch.is_batchedtensor(tensor) or tensor.shape[: index.dim()] != index.shape:
        return None
    mask = index.view(index.shape + (1,) * (tensor.dim() - index.dim()))
    tensor.copy_(torch.where(mask, value, tensor))
    return _DONE


def _empty(*size: Any, **options: Any) -> Any:
    """With a task dimension, so that tensors and random numbers of a task may be written to it."""
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter) or options.keys() - _OF_EMPTY:
        return None
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    shape = (interpreter.batch_size(), *shape)
    return call_with_tasks(lambda: torch.empty(shape, **options))


def _new(tensor: Tensor, *size: Any) -> Any:
    """As used by samplers of `torch.distributions`."""
    if not size or not isinstance(size[0], (int, torch.Size)):
        return None
    return _empty(*size, dtype=tensor.dtype, device=tensor.device)


def _elementwise(function: Any, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch only warns where the shapes differ, such as [N, 1] and [N]."""
    if input.shape == target.shape:
        return None
    shape = torch.broadcast_shapes(input.shape, target.shape)
    if shape not in (input.shape, target.shape):
        raise ValueError(
            f"{function.__name__} of {list(input.shape)} and {list(target.shape)} would compare "
            "each with each: give both the same shape"
        )
    return None


_DONE = object()
_OF_EMPTY = {"dtype", "device"}
FORMS: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.embedding: _aten_embedding,
    F.cross_entropy: _cross_entropy,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    Tensor.__setitem__: _setitem,
    torch.empty: _empty,
    Tensor.new: _new,
    F.scaled_dot_product_attention: attention,
    # An encoder would make a nested tensor of what is not padding.
    torch._nested_tensor_from_mask_left_aligned: lambda src, mask: False,
    **recurrent.FORMS,
}
for _loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss):
    FORMS[_loss] = partial(_elementwise, _loss)
