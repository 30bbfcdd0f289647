"""Batches of tasks, and the protocols of their sources."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class TaskBatch:
    """B tasks.

    Attributes:
        support: examples to adapt to, a pytree of [B, ...] tensors.
        query: examples to evaluate on, another pytree with the same B.
    """

    support: Any
    query: Any

    def clone(self) -> "TaskBatch":
        """A deep copy, detached."""
        return TaskBatch(*pytree.tree_map(lambda t: t.detach().clone(), self._parts()))

    def copy_(self, other: "TaskBatch") -> None:
        """Copy the tensors of another batch into this one's.

        Raises:
            ValueError: their structures, shapes or dtypes differ; nothing is written.
        """
        mine, structure = pytree.tree_flatten(self._parts())
        theirs, other_structure = pytree.tree_flatten(other._parts())
        expected, got = ([(list(t.shape), t.dtype) for t in leaves] for leaves in (mine, theirs))
        if structure != other_structure or expected != got:
            raise ValueError(f"the batch must have the shapes and dtypes {expected}, got {got}")
        for target, source in zip(mine, theirs, strict=True):
            target.copy_(source)

    def rows(self, tasks: range) -> "TaskBatch":
        """These tasks of the batch, as views."""
        return TaskBatch(*pytree.tree_map(lambda t: t[tasks.start : tasks.stop], self._parts()))

    def __len__(self) -> int:
        size: int = pytree.tree_leaves(self._parts())[0].shape[0]
        return size

    def _parts(self) -> tuple[Any, Any]:
        return self.support, self.query


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
