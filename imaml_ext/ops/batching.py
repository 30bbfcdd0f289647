"""vmap over tasks, and calls outside of it from a function that it maps."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree


def for_each_task(function: Callable[..., Any], tasks: int, *operands: Any) -> Any:
    """`torch.func.vmap(function, randomness="different")(*operands)`.

    Operands and results are pytrees of tensors, [tasks, ...]; they are not checked. Does what vmap
    does, whose wrappers cost more than a small layer.
    """
    _load_decompositions()
    level = _functorch._vmap_increment_nesting(tasks, "different")
    try:
        results = function(*_map(lambda t: _functorch._add_batch_dim(t, 0, level), operands))
        return _map(lambda t: _functorch._remove_batch_dim(t, level, tasks, 0), results)
    finally:
        _functorch._vmap_decrement_nesting()


_load_decompositions = cache(lazy_load_decompositions)


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """As `pytree.tree_map`, which takes several times as long for pairs of tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is tuple:
        return tuple([_map(function, each) for each in tree])
    return pytree.tree_map(function, tree)


def call_with_tasks(function: Callable[..., Any], *operands: Tensor | None) -> Any:
    """`function(*operands)`, called outside vmap, with the task dimension of each operand first.

    An operand without it is expanded. Does what `torch.autograd.Function.vmap` does, whose dispatch
    costs more than a small layer.
    """
    level: Any = _functorch.maybe_current_level()
    tensors = [None if t is None else tasks_first(t) for t in operands]
    outside = _functorch.pop_dynamic_layer_stack()
    try:
        result = function(*tensors)
    finally:
        _functorch.push_dynamic_layer_stack(outside)
    if isinstance(result, tuple):
        return tuple(_functorch._add_batch_dim(t, 0, level) for t in result)
    return _functorch._add_batch_dim(result, 0, level)


def is_only_transform() -> bool:
    """Whether one vmap is active, and no other transform or forward-mode differentiation."""
    return _functorch.maybe_current_level() == 1 and forward_ad._current_level < 0


def is_grads_batched(vector: Tensor) -> bool:
    """Whether a backward pass receives several vectors: `autograd.grad(is_grads_batched=True)`."""
    return _functorch.is_legacy_batchedtensor(vector)


def call_for_each(
    function: Callable[[Tensor], tuple[Any, ...]], vectors: Tensor
) -> tuple[Any, ...]:
    """`function` of each of the batched vectors: its tensors, stacked and batched again."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    results = [function(vector) for vector in torch._remove_batch_dim(vectors, level, 1, 0)]
    stacks = (None if each[0] is None else torch.stack(each) for each in zip(*results, strict=True))
    return tuple(None if t is None else torch._add_batch_dim(t, 0, level) for t in stacks)


def tasks_first(batched: Tensor) -> Tensor:
    dim = _functorch.maybe_get_bdim(batched)
    if dim < 0:  # without tasks
        tasks: int = retrieve_current_functorch_interpreter().batch_size()  # type: ignore[attr-defined]
        return batched.expand(tasks, *batched.shape)
    tensor = _functorch.get_unwrapped(batched)
    return tensor.movedim(dim, 0) if dim else tensor


def channels_last(x: Tensor) -> Tensor:
    """[B, N, H, W, C], contiguous, from [B, N, C, H, W]."""
    return x.permute(0, 1, 3, 4, 2).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """The inverse of `channels_last`, as a view."""
    return x.permute(0, 1, 4, 2, 3)


def contiguous_per_task(t: Tensor) -> Tensor:
    """`t`, or a copy where a task is not contiguous. Slices of rows of parameters need no copy."""
    return t if t[0].is_contiguous() else t.contiguous()
