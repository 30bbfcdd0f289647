"""Recording work of fixed shapes as a CUDA graph, which removes the cost of launching kernels.

A replay launches the recorded kernels on the same memory. Values from the host are frozen; whatever
changes between replays must be a tensor that is written in place.

Source: torch's notes on CUDA graphs, "Whole-network capture".
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils import _pytree as pytree

from imaml_ext._tracing import recording

T = TypeVar("T")

_WARMUPS = 3  # to allocate workspaces, choose algorithms and load kernels


class Capture(Protocol):
    """A way to record work of fixed shapes: `cuda_graph`, `compiled` or `no_capture`."""

    def __call__(self, function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
        """Return a function equivalent to `function`: the same effects and the same result.

        Args:
            function: what to record.
            warmup: does what `function` does, and undoes its effects; may be called any number of
                times before recording.

        Raises:
            RuntimeError: recording failed. `function` has had no effect on any tensor.
        """


def cuda_graph(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """A CUDA graph of `function` on the current device, in a private memory pool; a `Capture`.

    Recording waits for the device; replaying does not. Every replay returns the same tensors, with
    new values. Warm-up does not advance torch's random state.

    Args:
        function, warmup: as in `Capture`.

    Raises:
        RuntimeError: `function` synchronises, or cannot be captured; the message has the cause.
    """
    stream = torch.cuda.Stream()
    with recording():
        _warm_up(warmup, stream)
        graph, result = _captured(function, stream)

    def replay() -> T:
        graph.replay()
        # New dataclasses, since the old ones may have cached properties.
        return cast(T, pytree.tree_map(lambda leaf: leaf, result))

    return replay


def _warm_up(work: Callable[[], Any], stream: torch.cuda.Stream) -> None:
    caller = torch.cuda.current_stream()
    stream.wait_stream(caller)
    try:
        random = torch.random.fork_rng([torch.cuda.current_device()], device_type="cuda")
        with torch.cuda.stream(stream), random:
            for _ in range(_WARMUPS - 1):
                work()
            # Finds synchronisation before the capture, whose failure is harder to recover from.
            with _synchronising_raises():
                work()
    finally:
        caller.wait_stream(stream)  # a warm-up that failed may still be undoing its writes


def _captured(function: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Any, T]:
    caller, cause = torch.cuda.current_stream(), None
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.clear_autocast_cache()  # its casts are in the warm-up's memory, which will be freed
    gc.collect()  # destroying a CUDA graph during a capture may invalidate it
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            try:
                return graph, function()
            except Exception as error:
                cause = error
                raise
    except RuntimeError as error:
        torch.cuda.set_stream(caller)
        _leave_capture(pool, stream)
        # Ending a failed capture raises as well, which hides the cause.
        raise RuntimeError(str(cause or error)) from error
    finally:
        torch.clear_autocast_cache()  # its casts are in the graph's memory


def _leave_capture(pool: Any, stream: torch.cuda.Stream) -> None:
    """Reset the state that torch 2.10, and in part later versions, leave after a failed capture.

    The allocator remains in capture mode, and aborts the process when a memory pool is destroyed;
    the default generator raises an error.
    """
    with suppress(RuntimeError):  # already done by torch
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):  # which resets the generator
        torch.zeros((), device="cuda")


def no_capture(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """`function` itself; a `Capture` that records nothing.

    Args:
        function, warmup: as in `Capture`; `warmup` is not called.
    """
    return function


@contextmanager
def _synchronising_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)
