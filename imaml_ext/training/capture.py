"""Work of fixed shapes, recorded once and replayed: on CUDA, where launching it is what takes time.

A CUDA graph repeats what was launched while it was recorded, on the same memory. What came from
the host stays as it was then; what is to change between replays is a tensor, written in place.

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

_WARMUPS = 3  # allocate workspaces, choose algorithms, load kernels


class Capture(Protocol):
    """A way to record work of fixed shapes: `cuda_graph`, `compiled` or `no_capture`."""

    def __call__(self, function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
        """A function that does what `function` does, once a call.

        Args:
            function: what to record.
            warmup: all of what `function` does, its effects undone; run before, any number of
                times.

        Raises:
            RuntimeError: it cannot be recorded. `function` has had no effect on any tensor.
        """


def cuda_graph(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """A CUDA graph of `function` on the current device, in a memory pool of its own; a `Capture`.

    Recording waits for the device; replaying does not. A replay returns the same tensors as the
    one before, with new values. Random numbers go on as if nothing had been warmed_up.

    Args:
        function, warmup: as in `Capture`.

    Raises:
        RuntimeError: something in it synchronises, or cannot be captured; the message says why.
    """
    stream = torch.cuda.Stream()
    with recording():
        _warm_up(warmup, stream)
        graph, result = _captured(function, stream)

    def replay() -> T:
        graph.replay()
        # The same tensors in new dataclasses: the old ones may have computed properties.
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
            # What synchronises is found here: a capture that fails costs more to recover from.
            with _synchronising_raises():
                work()
    finally:
        caller.wait_stream(stream)  # it may still undo what it wrote


def _captured(function: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Any, T]:
    caller, cause = torch.cuda.current_stream(), None
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.clear_autocast_cache()  # casts of the rehearsals, which will be freed
    gc.collect()  # a CUDA graph that is destroyed during a capture may invalidate it
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
        # Ending a capture that failed raises too, which hides why it did.
        raise RuntimeError(str(cause or error)) from error
    finally:
        torch.clear_autocast_cache()  # casts in the graph's memory


def _leave_capture(pool: Any, stream: torch.cuda.Stream) -> None:
    """Put right what a capture that failed leaves behind in torch 2.10, and partly in later ones.

    The allocator goes on as if it were capturing, and ends the process when a memory pool is
    destroyed; the default generator refuses to draw.
    """
    with suppress(RuntimeError):  # torch has done it
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):  # whose end frees the generator
        torch.zeros((), device="cuda")


def no_capture(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """`function` itself; a `Capture` that records nothing.

    Args:
        function, warmup: as in `Capture`; nothing is warmed_up.
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
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)
