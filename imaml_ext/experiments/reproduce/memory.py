"""Memory: of a call by torch's own accounting, and of the process by the system's."""

import ctypes
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that `call` has allocated at once. Calls it once more, before, on CUDA."""
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
    # recorded.events() leaves out the allocations inside operators; the raw events have all.
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
    """Give back to the system what nothing refers to; glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(which: str) -> int:
    """The resident set now (VmRSS), or at its largest (VmHWM); Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024
