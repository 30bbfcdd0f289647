"""Batches of tasks, and the protocols of their sources."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from imaml_ext._checks import kind_of
from imaml_ext.data.mini_batches import rows_of_tasks


@dataclass(frozen=True)
class TaskBatch:
    """B tasks.

    Attributes:
        support: examples to adapt to, a pytree of [B, ...] tensors.
        query: examples to evaluate on, another pytree with the same B.
        weights: of the tasks in the meta-gradient, [B], as in `implicit_meta_grad`; None: all
            equal.
    """

    support: Any
    query: Any
    weights: Tensor | None = None

    @staticmethod
    def of(value: Any) -> "TaskBatch":
        """A batch from any of the forms that loaders give.

        Args:
            value: a TaskBatch, a pair (support, query), (support x, support y, query x, query y),
                {"support": ..., "query": ...} or {"train": ..., "test": ...}; the dicts may have
                "weights" too.

        Raises:
            TypeError: it has another form, or is a pair of tensors, which may also be (x, y).
        """
        if isinstance(value, TaskBatch):
            return value
        got = kind_of(value)
        if isinstance(value, Mapping):
            for names in (("support", "query"), ("train", "test")):
                if value.keys() - {"weights"} == set(names):
                    support, query = (value[name] for name in names)
                    return TaskBatch(support, query, value.get("weights"))
            got = f"a dict of {list(value)}"
        if isinstance(value, (tuple, list)):
            tensors = [isinstance(part, Tensor) for part in value]
            if tensors == [True] * 4:
                return TaskBatch(tuple(value[:2]), tuple(value[2:]))
            if tensors == [False] * 2:
                return TaskBatch(*value)
            got = f"a {got} of {', '.join(map(kind_of, value[:5]))}"
        raise TypeError(
            "a batch must be TaskBatch(support, query), ((x, y), (x, y)), (x, y, x, y), or a dict "
            f"of support and query or of train and test, got {got}"
        )

    def to(self, device: torch.device) -> "TaskBatch":
        """The batch with its tensors on this device."""
        fast = device.type == "cuda"  # copies from pinned memory need not wait
        parts = pytree.tree_map_only(
            Tensor, lambda t: t.to(device, non_blocking=fast), self._parts()
        )
        return TaskBatch(*parts)

    def clone(self) -> "TaskBatch":
        """A deep copy, detached."""
        return TaskBatch(*pytree.tree_map(lambda t: t.detach().clone(), self._parts()))

    def copy_(self, other: "TaskBatch") -> None:
        """Copy the tensors of another batch into this one's.

        Raises:
            ValueError: as `check_like`; nothing is written.
        """
        self.check_like(other)
        leaves = map(pytree.tree_leaves, (self._parts(), other._parts()))
        for target, source in zip(*leaves, strict=True):
            target.copy_(source)

    def check_like(self, other: "TaskBatch") -> None:
        """Raises ValueError if structures, shapes or dtypes differ from those of this batch."""
        mine, structure = pytree.tree_flatten(self._parts())
        theirs, other_structure = pytree.tree_flatten(other._parts())
        expected, got = ([(list(t.shape), t.dtype) for t in leaves] for leaves in (mine, theirs))
        if structure != other_structure or expected != got:
            raise ValueError(f"the batch must have the shapes and dtypes {expected}, got {got}")

    def rows(self, tasks: range) -> "TaskBatch":
        """These tasks of the batch, as views."""
        chosen = slice(tasks.start, tasks.stop)
        return TaskBatch(*(rows_of_tasks(part, chosen) for part in self._parts()))

    def __len__(self) -> int:
        size: int = pytree.tree_leaves(self._parts())[0].shape[0]
        return size

    def _parts(self) -> tuple[Any, ...]:
        parts = self.support, self.query
        return parts if self.weights is None else (*parts, self.weights)


class TaskSource(Protocol):
    """Anything that samples batches of tasks. The same step always gives the same batch."""

    def sample(self, step: int) -> TaskBatch:
        """The batch of this step, counted from 0."""


@runtime_checkable
class ShardableSource(Protocol):
    """A source that can sample some tasks of each batch without the others.

    Attributes:
        tasks: B.
    """

    tasks: int

    def shard(self, tasks: range) -> TaskSource:
        """A source of these tasks of each batch, bit for bit as in the whole batch.

        Args:
            tasks: consecutive indices, from 0.
        """


@runtime_checkable
class RecordableSource(Protocol):
    """A source whose sampling can be recorded as a part of the meta-step.

    Its `sample` also accepts the step as a 0-d int64 tensor on the device of the tasks, and does
    not read its value on the host. The attribute `recordable` marks such a source.
    """

    recordable: bool

    def sample(self, step: int | Tensor) -> TaskBatch:
        """The batch of this step, an int or a 0-d int64 tensor."""


class LoaderSource:
    """A source of the batches of a sequence, or of a DataLoader or another iterable.

    With a sequence, step k gets batch `k % len`. With another iterable, each new step gets the next
    batch, whatever its number, and the iterable restarts when it ends; only the last batch can be
    sampled again.

    Args:
        loader: its batches have any of the forms of `TaskBatch.of`.
        device: where the batches are moved.

    Attributes:
        repeatable: whether the batch is a function of the step.
        step: the step of the last batch; -1 before the first.

    Raises:
        TypeError: it is not an iterable, or a batch of the sequence has another form.
        ValueError: the sequence is empty.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        _check_iterable(loader)
        self.device = device
        self.repeatable = isinstance(loader, Sequence)
        self.step = -1
        self._loader = [TaskBatch.of(b) for b in loader] if self.repeatable else loader
        if self._loader == []:
            raise ValueError("source has no batches")
        self._batches: Iterator[Any] = iter(())
        self._batch: TaskBatch | None = None  # the last one

    def sample(self, step: int) -> TaskBatch:
        """The batch of this step.

        Raises:
            TypeError: the batch has another form.
            ValueError: the iterable has ended, and cannot start again.
        """
        if isinstance(self._loader, list):
            batch: TaskBatch = self._loader[step % len(self._loader)]
            return batch.to(self.device)
        if self._batch is None or step != self.step:
            self._batch = TaskBatch.of(self._next()).to(self.device)
            self.step = step
        return self._batch

    def can_sample(self, step: int) -> bool:
        """Whether `sample` would return the same batch for this step as before."""
        return self.repeatable or step == self.step

    def _next(self) -> Any:
        for batch in self._batches:
            return batch
        self._batches = iter(self._loader)
        for batch in self._batches:
            return batch
        raise ValueError(
            f"source ({kind_of(self._loader)}) has no more batches: pass a DataLoader, or another "
            "iterable that can be iterated over repeatedly or does not end"
        )


def as_source(source: Any, device: torch.device) -> TaskSource:
    """The source itself, or a `LoaderSource` of an iterable.

    Raises:
        TypeError, ValueError: as `LoaderSource`.
    """
    return source if _has_sample(source) else LoaderSource(source, device)


def batches(source: Any, device: torch.device) -> Iterator[TaskBatch]:
    """The batches of a source, without end, or those of one pass over an iterable.

    Args:
        source: a `TaskSource`, or as in `LoaderSource`.
        device: where the batches of an iterable are moved.

    Raises:
        TypeError: it is neither, or a batch has another form.
    """
    if _has_sample(source):
        yield from (TaskBatch.of(source.sample(step)) for step in count())
    else:
        _check_iterable(source)
        yield from (TaskBatch.of(batch).to(device) for batch in source)


def _has_sample(source: Any) -> bool:
    return callable(getattr(source, "sample", None)) and not isinstance(source, type)


def _check_iterable(source: Any) -> None:
    refused = (str, Mapping, Dataset)  # a dataset has single tasks
    if not isinstance(source, Iterable) or isinstance(source, refused):
        raise TypeError(
            "source must have a method sample(step), or be an iterable of batches such as "
            f"DataLoader(dataset, batch_size=tasks) or a list, got {kind_of(source)}"
        )
