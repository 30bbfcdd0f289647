"""Memory of a call, counted by torch, and of the process, counted by the system."""

import ctypes
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes allocated at once in `call`; on CUDA it is called twice."""
    if device.type == "cuda":
        call()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the profiler's own
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
    # recorded.events() omits the allocations inside operators.
    assert recorded.profiler is not None
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def release_free_memory() -> None:
    """Return free memory to the system (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(which: str) -> int:
    """The current (VmRSS) or largest (VmHWM) resident set of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024
