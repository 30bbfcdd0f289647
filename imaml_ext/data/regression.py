"""Sinusoid regression, a task distribution that needs no data."""

import math
from copy import copy

import torch
from torch import Tensor

from imaml_ext._checks import check_integer
from imaml_ext._random import random_bits, uniform
from imaml_ext.data.tasks import TaskBatch

_TASK, _SUPPORT, _QUERY = range(3)  # streams of random numbers


class Sinusoid:
    """`y = a sin(x - b)` with a in [0.1, 5], b in [0, pi] and x in [-5, 5], uniform.

    A `ShardableSource`, since a task is a function of (seed, step, its index), and a
    `RecordableSource`.

    Args:
        shot, query: number of points in the support and the query set.
        tasks: number of tasks in a batch, B.
        seed: determines the tasks.
        device, dtype: those of the sampled tensors.

    Raises:
        TypeError, ValueError: a size is not an integer or below 1.

    Source: Finn, Abbeel, Levine 2017, section 5.1.
    """

    recordable = True

    def __init__(
        self,
        *,
        shot: int = 10,
        query: int = 10,
        tasks: int = 25,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (("shot", shot), ("query", query), ("tasks", tasks)):
            check_integer(name, value, minimum=1)
        self.shot, self.query, self.tasks, self.seed = shot, query, tasks, seed
        self.task_indices = range(tasks)
        self.device, self.dtype = torch.device(device), dtype

    def sample(self, step: int | Tensor) -> TaskBatch:
        """Support and query (x [B, N, 1], y [B, N, 1])."""
        draw = self._uniform(step, _TASK, 2, 1, 1)
        amplitude, phase = 0.1 + 4.9 * draw[:, 0], math.pi * draw[:, 1]

        def examples(stream: int, count: int) -> tuple[Tensor, Tensor]:
            x = 10 * self._uniform(step, stream, count, 1) - 5
            y = amplitude * torch.sin(x - phase)
            return x.to(self.dtype), y.to(self.dtype)

        return TaskBatch(support=examples(_SUPPORT, self.shot), query=examples(_QUERY, self.query))

    def shard(self, tasks: range) -> "Sinusoid":
        """A source of these tasks of each batch."""
        shard = copy(self)
        shard.task_indices = self.task_indices[tasks.start : tasks.stop]
        shard.tasks = len(tasks)
        return shard

    def _uniform(self, step: int | Tensor, stream: int, *shape: int) -> Tensor:
        bits = random_bits(self.seed, step, stream, self.task_indices, shape, self.device)
        return uniform(bits)
