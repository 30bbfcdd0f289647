"""Timing on CUDA: events around many calls, operands that are not in the cache, graphs.

A call of microseconds is not timed alone: events have a resolution of half a microsecond, and what
the host does before a launch would be timed too. So a sample is the mean of at least 20 calls, each
on its own copy of the operands where the operands would stay in the L2 cache otherwise.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from imaml_ext.training.capture import cuda_graph

Implementation = Callable[[], Any]
CALLS = 20  # of a sample, at least


def copies(operand_bytes: int, device: torch.device) -> int:
    """How many copies of the operands to take in turn: twice the L2 cache, and at least `CALLS`.

    On the CPU 1: there operands that fit into a cache are timed in it, as they are used.
    """
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(CALLS, math.ceil(2 * cache / operand_bytes))


class Rotated:
    """An implementation on several copies of its operands; calling it uses the first.

    Args:
        calls: one for each copy.
    """

    def __init__(self, calls: Sequence[Implementation]) -> None:
        self.calls = list(calls)

    def __call__(self) -> Any:
        return self.calls[0]()


class Captured:
    """An implementation as a CUDA graph: of the calls on all copies, if it is `Rotated`.

    Attributes:
        count: calls that a replay makes.

    Raises:
        RuntimeError: it cannot be captured; the message says why.
    """

    def __init__(self, call: Implementation) -> None:
        calls = call.calls if isinstance(call, Rotated) else [call]

        def all_calls() -> list[Any]:
            return [each() for each in calls]

        self.count = len(calls)
        self.replay = cuda_graph(all_calls, all_calls)

    def __call__(self) -> Any:
        """What the call on the first copy returns."""
        return self.replay()[0]


def captured(name: str, call: Implementation) -> dict[str, Implementation]:
    """`call` as a CUDA graph by its name; none, said on stderr, where it cannot be captured."""
    try:
        return {f"{name}, CUDA graph": Captured(call)}
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"left out, cannot be captured: {name}: {reason}", file=sys.stderr)
        return {}


def cuda_seconds(call: Implementation, device: torch.device, *, short: bool) -> float:
    """Seconds per call, by events around them.

    Args:
        call: of a `Rotated` one each copy is used once, since it has to be restored before it is
            used again. One with `submit`, which launches on streams that torch does not know and
            returns an array of JAX, is timed by the host's clock.
        short: whether other calls are repeated, `CALLS` times.
    """
    count = getattr(call, "count", 1)
    calls = [call] * (CALLS if short and count == 1 else 1)
    if isinstance(call, Rotated):
        calls = call.calls
    torch.cuda.synchronize(device)
    if hasattr(calls[0], "submit"):
        start = time.perf_counter()
        for array in [each.submit() for each in calls]:
            array.block_until_ready()
        return (time.perf_counter() - start) / len(calls)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for each in calls:
        each()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / (len(calls) * count)
