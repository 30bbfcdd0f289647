"""The tasks of a meta-step shared by the processes of `torch.distributed`.

A batch of B tasks over N processes: each deals its own B / N and computes their meta-gradient; one
all-reduce of D numbers and a few gives every process the mean over all B, whatever B is. Each then
makes the same update.
"""

import gc
import hashlib
import importlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imaml_ext.data.tasks import ShardableSource, TaskBatch, TaskSource
from imaml_ext.problem.layout import Params

Group = dist.ProcessGroup


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_device(device: torch.device) -> torch.device:
    """Of a process that torchrun started: its own GPU, unless one is named."""
    if device.type == "cuda" and device.index is None and is_launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[Group | None]:
    """The processes that torchrun started, with NCCL on CUDA and gloo elsewhere; else None.

    Nothing is to refer to the group when Python ends, so call it in a function: gloo's threads end
    with the group, and one that still lets go of a tensor at that moment would abort the process.

    Args:
        device: that this process computes on.
    """
    if not is_launched():
        yield None
        return
    # Its functions would hold, as default arguments, the group that is there when it is imported.
    importlib.import_module("torch.distributed.nn")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, own, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # torchrun may keep its store when it starts the processes again: without a name of their own
    # they could find the addresses of those that died.
    store = dist.PrefixStore(_roll_call(store, own, size), store)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own, world_size=size)
    yield dist.group.WORLD
    dist.destroy_process_group()  # not after an error: the others may never get there
    gc.collect()  # a device step is in a reference cycle, and refers to the group


def rank(group: Group | None) -> int:
    """Of this process; 0 where there is one alone."""
    return 0 if group is None else dist.get_rank(group)


def shard(source: TaskSource, group: Group | None) -> TaskSource:
    """A source that deals this process's tasks of each batch: consecutive ones, B / N or one more.

    A source that is not divisible deals the whole batch, of which the share is kept.
    """
    if group is None:
        return source
    if isinstance(source, ShardableSource):
        return source.shard(_range(source.tasks, group))
    return _Share(source, group)


class _Share:
    def __init__(self, source: TaskSource, group: Group) -> None:
        self.source, self.group = source, group

    def sample(self, step: int) -> TaskBatch:
        batch = self.source.sample(step)
        return batch.rows(_range(len(batch), self.group))


def _range(tasks: int, group: Group) -> range:
    size, own = group.size(), rank(group)
    if tasks < size:
        raise ValueError(f"{tasks} tasks cannot be shared by {size} processes: each needs one")
    return range(own * tasks // size, (own + 1) * tasks // size)


def average(
    gradients: Params, summary: Mapping[str, Tensor], tasks: int, group: Group
) -> tuple[Params, dict[str, Tensor]]:
    """What one process with the tasks of all would have, to rounding; one all-reduce.

    Args:
        gradients: means over this process's tasks, without those that failed if these are skipped.
        summary: 0-d; means over the tasks that did not fail, and the share that did, "failed".
        tasks: this process's.

    Raises:
        ConnectionError: another process is gone.
    """
    like = next(iter(gradients.values()))
    failed = summary["failed"].to(like.dtype)
    used = torch.round((1 - failed) * tasks)
    means = torch.stack([value for name, value in summary.items() if name != "failed"])
    sums = [
        *(gradient.flatten() * used for gradient in gradients.values()),
        torch.where(used > 0, means.to(like.dtype) * used, 0.0),
        used[None],
        torch.full_like(used, tasks)[None],
    ]
    buffer = torch.cat(sums)
    with _reaching_the_others(group):
        dist.all_reduce(buffer, group=group)
    used, whole = buffer[-2], buffer[-1]
    parts = (buffer[:-2] / used).split([part.numel() for part in sums[:-2]])
    averaged = {
        name: part.view_as(gradient)
        for (name, gradient), part in zip(gradients.items(), parts[:-1], strict=True)
    }
    names = [name for name in summary if name != "failed"]
    record = dict(zip(names, parts[-1].double(), strict=True))
    # The sum over the processes may overflow where no task failed.
    finite = torch.stack([part.isfinite().all() for part in parts[:-1]]).all()
    failed = 1 - (used / whole).double()
    return averaged, record | {"failed": torch.where(finite, failed, 1.0)}


def check_same(number: int, what: str, group: Group) -> None:
    """Raises ValueError where a process has another number than rank 0."""
    first = torch.tensor([number], device=_device_of(group))
    with _reaching_the_others(group):
        dist.broadcast(first, group=group, group_src=0)
    if first.item() != number:
        raise ValueError(f"rank {rank(group)}: {what} {number}, but {int(first)} on rank 0")


def broadcast_parameters(tensors: Mapping[str, Tensor], group: Group) -> None:
    """Overwrite the tensors of every process by those of rank 0."""
    with torch.no_grad(), _reaching_the_others(group):
        for tensor in tensors.values():
            value = tensor.contiguous()
            dist.broadcast(value, group=group, group_src=0)
            tensor.copy_(value)


@contextmanager
def _reaching_the_others(group: Group) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ConnectionError(f"rank {rank(group)} cannot reach the others: {said}") from error


def _roll_call(store: Any, own: int, size: int) -> str:
    """A name that these processes agree on, and no other ones have.

    Rank 0 lists who is there, and the name is that of the list; it holds once everyone on the list
    has confirmed it. One that was started again has another token, and is waited for.
    """
    token, moment = uuid.uuid4().hex[:16], timedelta(seconds=1)
    store.set(f"here {own}", token)
    while True:
        if own == 0:
            present = [store.get(f"here {other}").decode() for other in range(size)]
            store.set("roll", ",".join(present))
        roll = store.get("roll").decode()
        if roll.split(",")[own : own + 1] != [token]:
            time.sleep(0.05)
            continue
        name = hashlib.sha256(roll.encode()).hexdigest()[:16]
        store.set(f"{name} {own}", "")
        try:
            if own == 0:
                store.wait([f"{name} {other}" for other in range(size)], moment)
                store.set(name, "")
            store.wait([name], moment)
        except RuntimeError:  # someone on the list is gone
            continue
        return name


def _device_of(group: Group) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
