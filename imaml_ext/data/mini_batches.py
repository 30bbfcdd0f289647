"""Support sets in mini-batches: one for each step of an inner solver."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_callable, check_integer
from imaml_ext._random import random_bits


class MiniBatches:
    """A support set from which each step of an inner solver uses one mini-batch of every task.

    Step k of the solver evaluates the losses on `at(k)`. Everything else uses `data`: the residual,
    the curvature, the linear solve, and the implicit gradients of lam, shared parameters and data.
    So the implicit gradient is that of the minimum for `data`. If `data` is a fixed subsample of
    the support set, residuals and error estimates refer to the subsample only; the difference from
    the whole set is not estimated. Unrolled methods differentiate the steps on the mini-batches.

    It is a pytree, so that a batch with mini-batches can be moved, copied and recorded.

    Args:
        data: a pytree of [B, ...] tensors: the whole support set, or a fixed subsample.
        batches: a pytree of [B, S, ...] tensors, S mini-batches for each task: step k uses number
            `k % S`. Or a function that maps the step, an int from 0, to a pytree of [B, ...]
            tensors.

    Raises:
        TypeError, ValueError: `batches` is neither, or requires grad.

    Source: Robbins, Monro 1951, "A stochastic approximation method".
    """

    def __init__(self, data: Any, batches: Any) -> None:
        self.data = data
        self._batches: Any = None
        self._source: Callable[[int], Any] | None = None
        self._index: Tensor | None = None  # [B, S, n]
        leaves = pytree.tree_leaves(batches)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            check_callable("batches", batches, "(step)", "or pass [B, S, ...] tensors")
            self._source = batches
            return
        if min(leaf.dim() for leaf in leaves) < 2 or len({leaf.shape[:2] for leaf in leaves}) > 1:
            got = [list(leaf.shape) for leaf in leaves]
            raise ValueError(f"every tensor of batches must be [B, S, ...], got {got}")
        if any(leaf.requires_grad for leaf in leaves):
            raise ValueError(
                "batches must not require grad: only data can get an implicit gradient; detach them"
            )
        self._batches = batches

    @staticmethod
    def draw(data: Any, *, batch_size: int, steps: int, seed: int = 0) -> "MiniBatches":
        """Random mini-batches of `data`, without replacement within an epoch.

        An epoch has `N // batch_size` mini-batches; the remaining examples are not used in it. Each
        task has its own permutations, which depend only on the seed and the task's number. Only
        indices are stored; examples are selected in each step. Tasks are numbered from 0 in every
        call, so a shard of a batch has other mini-batches than the whole batch.

        Args:
            data: a pytree of [B, N, ...] tensors.
            batch_size: number of examples of each task in a mini-batch.
            steps: number of mini-batches; a solver with more steps starts again with the first.
            seed: a different one, such as the number of the meta-step, gives other mini-batches.

        Raises:
            TypeError, ValueError: the leaves are not [B, N, ...] tensors with the same B and N, or
                `batch_size` is not in 1 to N.
        """
        for name, value in (("batch_size", batch_size), ("steps", steps)):
            check_integer(name, value, minimum=1)
        check_integer("seed", seed)
        leaves = pytree.tree_leaves(data)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() > 1 for leaf in leaves):
            raise TypeError("data must be a pytree of [B, N, ...] tensors")
        sizes = {tuple(leaf.shape[:2]) for leaf in leaves}
        tasks, examples = min(sizes)
        if len(sizes) > 1 or batch_size > examples:
            raise ValueError(
                f"every tensor must have the same B and N, and N >= batch_size={batch_size}, "
                f"got [B, N] = {sorted(map(list, sizes))}"
            )
        each, device = examples // batch_size, leaves[0].device
        epochs = [
            random_bits(seed, epoch, 0, range(tasks), (examples,), device).argsort(dim=1)
            for epoch in range(math.ceil(steps / each))
        ]
        order = torch.cat([epoch[:, : each * batch_size] for epoch in epochs], dim=1)
        index = order.view(tasks, -1, batch_size)[:, :steps].contiguous()
        return _unflatten((data, index), (("_index",), None))

    def at(self, step: int) -> Any:
        """The mini-batch of a step, counted from 0: a pytree of [B, ...] tensors."""
        if self._source is not None:
            return self._source(step)
        if self._index is None:
            return pytree.tree_map(lambda leaf: leaf[:, step % leaf.shape[1]], self._batches)
        index = self._index[:, step % self._index.shape[1]]
        task = torch.arange(len(index), device=index.device)[:, None]
        return pytree.tree_map(lambda leaf: leaf.detach()[task, index], self.data)

    def rows(self, tasks: slice | Tensor) -> "MiniBatches":
        """The mini-batches of some tasks, given by a slice or their numbers."""

        def of_tasks(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: leaf[tasks], tree)

        rows: MiniBatches = of_tasks(self)
        if self._source is not None:
            source = self._source
            rows._source = lambda step: of_tasks(source(step))
        return rows


def split_batches(support: Any) -> tuple[Any, MiniBatches | None]:
    """The data of a support set, and its mini-batches if there are any."""
    return (support.data, support) if isinstance(support, MiniBatches) else (support, None)


def rows_of_tasks(support: Any, tasks: slice | Tensor) -> Any:
    """A support set with some tasks, a slice of them or their numbers."""
    if isinstance(support, MiniBatches):
        return support.rows(tasks)
    return pytree.tree_map(lambda leaf: leaf[tasks], support)


def _flatten(value: MiniBatches) -> tuple[list[Any], Any]:
    kinds = {"_batches": value._batches, "_index": value._index}
    present = [name for name, child in kinds.items() if child is not None]  # None would be a leaf
    return [value.data, *(kinds[name] for name in present)], (tuple(present), value._source)


def _unflatten(children: Iterable[Any], context: Any) -> MiniBatches:
    names, source = context
    value = MiniBatches.__new__(MiniBatches)
    value._batches = value._index = None
    value.data, *rest = children
    value._source = source
    for name, child in zip(names, rest, strict=True):
        setattr(value, name, child)
    return value


pytree.register_pytree_node(
    MiniBatches, _flatten, _unflatten, serialized_type_name="imaml_ext.MiniBatches"
)
