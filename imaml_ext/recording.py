"""Work of fixed shapes, recorded once and replayed: on CUDA, where launching it is what takes time.

A CUDA graph repeats what was launched while it was recorded, on the same memory. What came from
the host stays as it was then; what is to change between replays is a tensor, written in place.

Source: torch's notes on CUDA graphs, "Whole-network capture".
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils import _pytree as pytree

from imaml_ext.compiling import compiled
from imaml_ext.looking import recording
from imaml_ext.meta_gradient import MetaGradient
from imaml_ext.tasks import TaskBatch

T = TypeVar("T")

_REHEARSALS = 3  # allocate workspaces, choose algorithms, load kernels


class Capture(Protocol):
    """A way to record work of fixed shapes: `cuda_graph`, `compiled` or `unrecorded`."""

    def __call__(self, function: Callable[[], T], rehearse: Callable[[], Any]) -> Callable[[], T]:
        """A function that does what `function` does, once a call.

        Args:
            function: what to record.
            rehearse: all of what `function` does, its effects undone; run before, any number of
                times.

        Raises:
            RuntimeError: it cannot be recorded. `function` has had no effect on any tensor.
        """


def cuda_graph(function: Callable[[], T], rehearse: Callable[[], Any]) -> Callable[[], T]:
    """A CUDA graph of `function` on the current device, in a memory pool of its own; a `Capture`.

    Recording waits for the device; replaying does not. A replay returns the same tensors as the
    one before, with new values. Random numbers go on as if nothing had been rehearsed.

    Args:
        function, rehearse: as in `Capture`.

    Raises:
        RuntimeError: something in it synchronises, or cannot be captured; the message says why.
    """
    stream = torch.cuda.Stream()
    with recording():
        _rehearse(rehearse, stream)
        graph, result = _captured(function, stream)

    def replay() -> T:
        graph.replay()
        # The same tensors in new dataclasses: the old ones may have computed properties.
        return cast(T, pytree.tree_map(lambda leaf: leaf, result))

    return replay


def _rehearse(work: Callable[[], Any], stream: torch.cuda.Stream) -> None:
    caller = torch.cuda.current_stream()
    stream.wait_stream(caller)
    try:
        random = torch.random.fork_rng([torch.cuda.current_device()], device_type="cuda")
        with torch.cuda.stream(stream), random:
            for _ in range(_REHEARSALS - 1):
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


def unrecorded(function: Callable[[], T], rehearse: Callable[[], Any]) -> Callable[[], T]:
    """`function` itself; a `Capture` that records nothing.

    Args:
        function, rehearse: as in `Capture`; nothing is rehearsed.
    """
    return function


class RecordedMetaGradient:
    """A meta-gradient, recorded once for batches of one shape; call it with a batch.

    The result is the recording's own memory: the next call overwrites it, so clone what is to be
    kept. theta and tensors of lam are read anew in each call; they may be updated in place, as
    optimizers do, but not replaced. Plain numbers, such as a float lam, are as they were when it
    was recorded, and so is whether the model was in training mode.

    Args:
        meta_gradient: `method.meta_gradient`, or any function of a batch that calls
            `implicit_meta_grad`; nothing in it may synchronise.
        batch: of the shapes that all will have.
        capture: how to record; default `cuda_graph` on CUDA, `compiled` on the CPU.

    Raises:
        RuntimeError: it cannot be recorded; the message says why.
    """

    def __init__(
        self,
        meta_gradient: Callable[[TaskBatch], MetaGradient],
        batch: TaskBatch,
        *,
        capture: Capture | None = None,
    ) -> None:
        self._batch = batch.clone()
        self._lock = Lock()

        def function() -> MetaGradient:
            return meta_gradient(self._batch)

        example = pytree.tree_leaves(self._batch.support)[0]
        if capture is None:
            capture = cuda_graph if example.is_cuda else compiled
        if capture is cuda_graph and not example.is_cuda:
            raise RuntimeError(f"a CUDA graph needs a batch on CUDA, got one on {example.device}")
        with torch.cuda.device_of(example):
            self._replay = capture(function, function)

    def __call__(self, batch: TaskBatch) -> MetaGradient:
        """The meta-gradient of the batch, in the recording's memory. Nothing synchronises.

        Raises:
            ValueError: the batch is of other shapes than the one recorded.
        """
        with self._lock:
            self._batch.copy_(batch)
            return self._replay()


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
