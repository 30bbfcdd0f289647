"""Data parallelism over tasks, with `torch.distributed`.

Each of N processes samples its shard of B / N tasks and computes their meta-gradient. One
all-reduce of D numbers and a few more gives every process the mean over all B, and each makes the
same update.
"""

import hashlib
import importlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imaml_ext.data.tasks import LoaderSource, ShardableSource, TaskBatch, TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss

Group = dist.ProcessGroup


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_device(device: torch.device) -> torch.device:
    """Under torchrun the GPU of the local rank, unless `device` has an index; else `device`."""
    if device.type == "cuda" and device.index is None and is_launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def process_group(device: torch.device | str) -> Iterator[Group | None]:
    """The group of the processes that torchrun started, or None without torchrun.

    Uses NCCL on CUDA, gloo elsewhere. Call it in a function, so that nothing refers to the group
    when Python exits: gloo's threads end with the group, and one that releases a tensor during
    Python's exit aborts the process.

    Args:
        device: the device on which this process computes.
    """
    device = torch.device(device)
    if not is_launched():
        yield None
        return
    # Imported later, its functions would hold the group as a default argument.
    importlib.import_module("torch.distributed.nn")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, own, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # torchrun may keep its store when it restarts the processes: without a new prefix they
    # could find the addresses of processes that died.
    store = dist.PrefixStore(_agree_on_prefix(store, own, size), store)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own, world_size=size)
    yield dist.group.WORLD
    dist.destroy_process_group()  # not after an error: other ranks may never join


def rank(group: Group | None) -> int:
    """The rank of this process, 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def shard(source: TaskSource, group: Group | None) -> TaskSource:
    """A source of this process's shard of each batch: B / N consecutive tasks, or one more.

    A source that is not a `ShardableSource` samples the whole batch, of which the rows are taken.

    Raises:
        TypeError: the batches of the source are not functions of the step.
    """
    if group is None:
        return source
    if isinstance(source, LoaderSource) and not source.repeatable:
        raise TypeError(
            "with a process_group, source must have a method sample(step), or be a list of "
            "batches: an iterable may give each process other batches"
        )
    if isinstance(source, ShardableSource):
        return source.shard(_tasks_of_rank(source.tasks, group))
    return _RowsOfBatch(source, group)


class _RowsOfBatch:
    def __init__(self, source: TaskSource, group: Group) -> None:
        self.source, self.group = source, group

    def sample(self, step: int) -> TaskBatch:
        batch = TaskBatch.of(self.source.sample(step))
        return batch.rows(_tasks_of_rank(len(batch), self.group))


def _tasks_of_rank(tasks: int, group: Group) -> range:
    size, own = group.size(), rank(group)
    if tasks < size:
        raise ValueError(f"each process needs a task, got {tasks} tasks for {size} processes")
    return range(own * tasks // size, (own + 1) * tasks // size)


def with_some_weight(batch: TaskBatch) -> TaskBatch:
    """The batch, with equal weights if all are 0, as in a shard of padding tasks.

    The meta-gradient of such a shard has no weight in `average`.
    """
    if batch.weights is None:
        return batch
    weights = torch.where((batch.weights == 0).all(), torch.ones_like(batch.weights), batch.weights)
    return replace(batch, weights=weights)


def average(
    gradients: Params, record: Mapping[str, Tensor], tasks: int | Tensor, group: Group
) -> tuple[Params, dict[str, Tensor]]:
    """The gradients and record of the tasks of all processes, up to rounding, by one all-reduce.

    Args:
        gradients: means over this process's tasks, or over those that did not fail.
        record: 0-d; means over the tasks that did not fail, and "failed", the fraction that did.
        tasks: number of this process's tasks, or the sum of their weights, 0-d.

    Raises:
        ConnectionError: another process has died.
    """
    like = next(iter(gradients.values()))
    failed = record["failed"].to(like.dtype)
    if isinstance(tasks, Tensor):
        all_tasks = tasks.to(like.dtype)
        used = (1 - failed) * all_tasks
    else:
        all_tasks = torch.full_like(failed, tasks)
        used = torch.round((1 - failed) * all_tasks)
    names = [name for name in record if name != "failed"]
    means = torch.stack([record[name] for name in names])
    sums = [
        *(torch.where(used > 0, g.flatten() * used, 0.0) for g in gradients.values()),
        torch.where(used > 0, means.to(like.dtype) * used, 0.0),
        used[None],
        all_tasks[None],
    ]
    buffer = torch.cat(sums)
    with _naming_lost_peers(group):
        dist.all_reduce(buffer, group=group)
    used, all_tasks = buffer[-2], buffer[-1]
    parts = (buffer[:-2] / used).split([part.numel() for part in sums[:-2]])
    averaged = {
        name: part.view_as(gradient)
        for (name, gradient), part in zip(gradients.items(), parts[:-1], strict=True)
    }
    total = dict(zip(names, parts[-1].double(), strict=True))
    # The sum over the processes may overflow although no task failed.
    finite = torch.stack([part.isfinite().all() for part in parts[:-1]]).all()
    failed = 1 - (used / all_tasks).double()
    return averaged, total | {"failed": torch.where(finite, failed, 1.0)}


def check_same(number: int, what: str, group: Group) -> None:
    """Raise ValueError if this process's number differs from rank 0's."""
    first = [number]
    with _naming_lost_peers(group):
        dist.broadcast_object_list(first, group=group, group_src=0)
    if first != [number]:
        raise ValueError(f"{what} {number} on rank {rank(group)}, but {first[0]} on rank 0")


def broadcast_parameters(method: Method, group: Group) -> None:
    """Overwrite the method's learned tensors, and its models' other tensors, with rank 0's."""
    tensors = list(method.learned().values())
    for loss in (method.loss, method.query_loss):
        if isinstance(loss, ModuleLoss):
            tensors += [*loss.model.parameters(), *loss.model.buffers()]
    with torch.no_grad(), _naming_lost_peers(group):
        for tensor in tensors:
            value = tensor.contiguous()
            dist.broadcast(value, group=group, group_src=0)
            tensor.copy_(value)


@contextmanager
def _naming_lost_peers(group: Group) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {rank(group)} has lost the connection to other ranks: {message}"
        ) from error


def _agree_on_prefix(store: Any, own: int, size: int) -> str:
    """A name that these processes, and no earlier ones, agree on.

    Each process publishes a random token. Rank 0 publishes the list of tokens, whose hash is the
    name; it is valid once every process on the list has confirmed it. A process that was restarted
    has a new token, and the list is rebuilt.
    """
    token, timeout = uuid.uuid4().hex[:16], timedelta(seconds=1)
    store.set(f"token {own}", token)
    while True:
        if own == 0:
            tokens = [store.get(f"token {other}").decode() for other in range(size)]
            store.set("tokens", ",".join(tokens))
        listed = store.get("tokens").decode()
        if listed.split(",")[own : own + 1] != [token]:
            time.sleep(0.05)
            continue
        name = hashlib.sha256(listed.encode()).hexdigest()[:16]
        store.set(f"{name} {own}", "")
        try:
            if own == 0:
                store.wait([f"{name} {other}" for other in range(size)], timeout)
                store.set(name, "")
            store.wait([name], timeout)
        except RuntimeError:  # a process on the list has died
            continue
        return name
