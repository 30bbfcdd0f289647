"""Batches of tasks, and where they come from."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class TaskBatch:
    """B tasks: `support` to adapt on, `query` to judge by; each a pytree of [B, ...] tensors."""

    support: Any
    query: Any


class TaskSource(Protocol):
    """Anything that deals batches of tasks. The same step always gives the same batch."""

    def sample(self, step: int) -> TaskBatch: ...
