"""Timing on CUDA: events around many calls, operands that are not in the cache, CUDA graphs.

Calls of microseconds are not timed one by one: events have a resolution of half a microsecond, and
the time would include the host's work before a launch. A sample is the mean of at least 20 calls,
each on its own copy of the operands if they would otherwise stay in the L2 cache.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from imaml_ext.training.capture import cuda_graph

Implementation = Callable[[], Any]
CALLS = 20  # minimum number of calls in a sample


def copies(operand_bytes: int, device: torch.device) -> int:
    """Copies of the operands to use in turn: twice the L2 cache, and at least `CALLS`.

    1 on the CPU: operands that fit into its cache are used, and so timed, in the cache.
    """
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(CALLS, math.ceil(2 * cache / operand_bytes))


class Rotated:
    """An implementation on several copies of its operands; a call uses the first copy.

    Args:
        calls: one per copy.
    """

    def __init__(self, calls: Sequence[Implementation]) -> None:
        self.calls = list(calls)

    def __call__(self) -> Any:
        return self.calls[0]()


class Captured:
    """An implementation as a CUDA graph; if it is `Rotated`, of the calls on all copies.

    Attributes:
        count: number of calls in a replay.

    Raises:
        RuntimeError: it cannot be captured; the message has the cause.
    """

    def __init__(self, call: Implementation) -> None:
        calls = call.calls if isinstance(call, Rotated) else [call]

        def all_calls() -> list[Any]:
            return [each() for each in calls]

        self.count = len(calls)
        self.replay = cuda_graph(all_calls, all_calls)

    def __call__(self) -> Any:
        """Replay; returns the result of the first copy."""
        return self.replay()[0]


def captured(name: str, call: Implementation) -> dict[str, Implementation]:
    """{name: `call` as a CUDA graph}; empty, with a message, if it cannot be captured."""
    try:
        return {f"{name}, CUDA graph": Captured(call)}
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"left out, cannot be captured: {name}: {reason}", file=sys.stderr)
        return {}


def cuda_seconds(call: Implementation, device: torch.device, *, short: bool) -> float:
    """Seconds per call, measured by events.

    Args:
        call: if `Rotated`, each copy is used once, because it must be reset before it is used
            again. If it has `submit`, which launches on streams unknown to torch and returns a JAX
            array, it is timed by the host's clock.
        short: whether to repeat other calls `CALLS` times.
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
