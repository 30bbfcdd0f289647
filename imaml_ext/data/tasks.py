"""Batches of tasks, and where they come from."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class TaskBatch:
    """B tasks.

    Attributes:
        support: to adapt on, a pytree of [B, ...] tensors.
        query: to judge by, another with the same B.
    """

    support: Any
    query: Any

    def clone(self) -> "TaskBatch":
        """A copy that shares no memory."""
        return TaskBatch(*pytree.tree_map(lambda t: t.detach().clone(), self._parts()))

    def copy_(self, other: "TaskBatch") -> None:
        """Overwrite every tensor by that of another batch.

        Raises:
            ValueError: their structures, shapes or dtypes differ; nothing is written.
        """
        mine, structure = pytree.tree_flatten(self._parts())
        theirs, other_structure = pytree.tree_flatten(other._parts())
        expected, got = ([(list(t.shape), t.dtype) for t in leaves] for leaves in (mine, theirs))
        if structure != other_structure or expected != got:
            raise ValueError(f"the batch must be of {expected}, as it was first, got {got}")
        for to, source in zip(mine, theirs, strict=True):
            to.copy_(source)

    def rows(self, tasks: range) -> "TaskBatch":
        """These tasks of the batch alone; views."""
        return TaskBatch(*pytree.tree_map(lambda t: t[tasks.start : tasks.stop], self._parts()))

    def __len__(self) -> int:
        size: int = pytree.tree_leaves(self._parts())[0].shape[0]
        return size

    def _parts(self) -> tuple[Any, Any]:
        return self.support, self.query


class TaskSource(Protocol):
    """Anything that deals batches of tasks. The same step always gives the same batch."""

    def sample(self, step: int) -> TaskBatch:
        """The batch of this step, counted from 0."""


@runtime_checkable
class ShardableSource(Protocol):
    """A source that can deal some tasks of each batch without the others.

    Attributes:
        tasks: B, of the batches that it deals.
    """

    tasks: int

    def shard(self, tasks: range) -> TaskSource:
        """A source of these tasks of each batch, bit for bit as they are in the whole.

        Args:
            tasks: consecutive numbers of tasks, from 0.
        """


@runtime_checkable
class RecordableSource(Protocol):
    """A source that can be recorded as a part of the meta-step.

    Its `sample` takes the step also as a 0-d int64 tensor on the device of the tasks, and does not
    look at its value. It says so by having `recordable`.
    """

    recordable: bool

    def sample(self, step: int | Tensor) -> TaskBatch:
        """The batch of this step, an int or a 0-d int64 tensor."""
