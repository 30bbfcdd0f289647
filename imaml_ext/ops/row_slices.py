"""Slices of rows as weights, whose gradients a backward pass writes to the rows that it returns.

`torch.split` returns the same slices, but its derivative copies all gradients once more.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imaml_ext._tracing import is_tracing


class RowSlices(torch.autograd.Function):
    """Views [B, *shape] of rows [B, D], one for each shape."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shapes: Sequence[Sequence[int]], sizes: list[int]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.shapes, ctx.row_sizes = shapes, sizes
        ctx.rows = rows.detach()  # for its shape, dtype and device
        parts = rows.split_with_sizes(sizes, 1)
        return tuple(t.reshape(len(rows), *s) for t, s in zip(parts, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        written = _passes.rows.pop(ctx, None) if _passes.rows else None
        if written is None:
            return _concatenated(grads, ctx), None, None
        to: list[Tensor] = []
        copies: list[Tensor] = []
        for number, (grad, part) in enumerate(zip(grads, written.parts, strict=True)):
            if number in written.done:
                if grad is not None:  # of other uses of the weight
                    part.add_(grad)
            elif grad is None:
                part.zero_()
            else:
                to.append(part)
                copies.append(grad)
        if to:
            torch._foreach_copy_(to, copies)
        return written.rows, None, None


def _concatenated(grads: Sequence[Tensor | None], ctx: Any) -> Tensor:
    tasks = len(ctx.rows)
    parts = [
        ctx.rows.new_zeros(tasks, size) if grad is None else grad.reshape(tasks, size)
        for grad, size in zip(grads, ctx.row_sizes, strict=True)
    ]
    return torch.cat(parts, 1)


class _Written(NamedTuple):
    """The rows that the derivative of a `RowSlices` will return."""

    rows: Tensor
    parts: list[Tensor]  # its slices
    done: set[int]  # the numbers of those that have been written


class _Passes(threading.local):
    rows: dict[Any, _Written] | None = None  # by the node of a RowSlices; None outside of a pass


_passes = _Passes()


class WritingRows:
    """The context of a backward pass in which operators write to the rows that it returns.

    The pass must not return gradients of the slices themselves. It runs on the CPU in this thread;
    elsewhere, while tracing, and if a graph of it is created, the derivative concatenates.
    """

    def __enter__(self) -> None:
        self._outer, _passes.rows = _passes.rows, None if is_tracing() else {}

    def __exit__(self, *error: Any) -> None:
        _passes.rows = self._outer


class Destination(NamedTuple):
    """Where an operator writes a gradient."""

    part: Tensor  # [B, *shape]; a task is contiguous
    accumulate: bool  # whether another gradient is there already, to which this one is added


def destination(ctx: Any, operand: int) -> Destination | None:
    """Where the gradient of an operand goes in this pass, instead of being returned; or None.

    Args:
        ctx: the Function whose derivative is being computed.
        operand: the number of the operand among those that are tensors.
    """
    if _passes.rows is None or torch.is_grad_enabled():
        return None
    node, number = ctx.next_functions[operand]
    if not hasattr(node, "row_sizes"):  # not directly a slice
        return None
    written = _passes.rows.get(node)
    if written is None:
        rows = node.rows.new_empty(node.rows.shape)
        parts = rows.split_with_sizes(node.row_sizes, 1)
        views = [t.view(len(rows), *s) for t, s in zip(parts, node.shapes, strict=True)]
        written = _passes.rows[node] = _Written(rows, views, set())
    accumulate = number in written.done
    written.done.add(number)
    return Destination(written.parts[number], accumulate)
