"""Operands of an operator under vmap, with the task dimension first."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter


def call_with_tasks(function: Callable[..., Any], *operands: Tensor | None) -> Any:
    """`function(*operands)`, called outside vmap, with the task dimension of each operand first.

    Does what `torch.autograd.Function.vmap` does, whose dispatch costs more than a small layer.
    """
    level: Any = _functorch.maybe_current_level()
    with retrieve_current_functorch_interpreter().lower():
        result = function(*(None if t is None else tasks_first(t) for t in operands))
    if isinstance(result, tuple):
        return tuple(_functorch._add_batch_dim(t, 0, level) for t in result)
    return _functorch._add_batch_dim(result, 0, level)


def tasks_first(batched: Tensor) -> Tensor:
    return _functorch.get_unwrapped(batched).movedim(_functorch.maybe_get_bdim(batched), 0)


def channels_last(x: Tensor) -> Tensor:
    """[B, N, H, W, C], contiguous, from [B, N, C, H, W]."""
    return x.permute(0, 1, 3, 4, 2).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """The inverse of `channels_last`, as a view."""
    return x.permute(0, 1, 4, 2, 3)


def contiguous_per_task(t: Tensor) -> Tensor:
    """`t`, or a copy where a task is not contiguous. Slices of rows of parameters need no copy."""
    return t if t[0].is_contiguous() else t.contiguous()
