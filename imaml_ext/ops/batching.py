"""Operands of an operator under vmap: one more dimension, that of the tasks, in front."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter


def for_tasks(function: Callable[..., Any], *operands: Tensor | None) -> Any:
    """`function(*operands)` of a vmapped function's operands, their task dimensions in front.

    As `torch.autograd.Function.vmap` would have it, whose dispatch costs more than a small layer.
    """
    level: Any = _functorch.maybe_current_level()
    with retrieve_current_functorch_interpreter().lower():
        result = function(*(None if t is None else tasks_in_front(t) for t in operands))
    if isinstance(result, tuple):
        return tuple(_functorch._add_batch_dim(t, 0, level) for t in result)
    return _functorch._add_batch_dim(result, 0, level)


def tasks_in_front(batched: Tensor) -> Tensor:
    return _functorch.get_unwrapped(batched).movedim(_functorch.maybe_get_bdim(batched), 0)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous()


def tasks_contiguous(t: Tensor) -> Tensor:
    """As parameters lie in the rows of all parameters, where those of each task are contiguous."""
    return t if t[0].is_contiguous() else t.contiguous()
