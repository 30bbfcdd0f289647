"""A meta-gradient, recorded once and replayed."""

from collections.abc import Callable
from threading import Lock

import torch
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_callable
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.meta_gradient import MetaGradient
from imaml_ext.training.capture import Capture, cuda_graph
from imaml_ext.training.capture_programs import compiled


class RecordedMetaGradient:
    """A meta-gradient recorded once for batches of one shape; call it with a batch.

    Every call reads the current values of theta and of lam's tensors. As a CUDA graph, the next
    call overwrites the result: clone what you keep. Tensors may then be updated in place, as
    optimizers do, but not replaced, and plain numbers, such as a float lam, and the model's
    training mode are frozen. On the CPU they may change; see `compiled`.

    Args:
        meta_gradient: `method.meta_gradient`, or any function of a batch that calls
            `implicit_meta_grad`; on CUDA it must not synchronise.
        batch: an example; all batches must have its shapes.
        capture: how to record; default `cuda_graph` on CUDA, `compiled` on the CPU.

    Raises:
        TypeError: an argument is not a function, or a batch.
        RuntimeError: it cannot be recorded; the message has the cause.
    """

    def __init__(
        self,
        meta_gradient: Callable[[TaskBatch], MetaGradient],
        batch: TaskBatch,
        *,
        capture: Capture | None = None,
    ) -> None:
        check_callable("meta_gradient", meta_gradient, "(batch)", "pass method.meta_gradient")
        self._batch = TaskBatch.of(batch).clone()
        self._lock = Lock()

        def function() -> MetaGradient:
            return meta_gradient(self._batch)

        example = pytree.tree_leaves(self._batch.support)[0]
        if capture is None:
            capture = cuda_graph if example.is_cuda else compiled
        check_callable("capture", capture, "(function, warmup)")
        if capture is cuda_graph and not example.is_cuda:
            raise RuntimeError(f"a CUDA graph needs a batch on CUDA, got one on {example.device}")
        self._is_compiled = capture is compiled
        with torch.cuda.device_of(example):
            self._replay = capture(function, function)

    def __call__(self, batch: TaskBatch) -> MetaGradient:
        """The meta-gradient of the batch. Does not synchronise.

        Raises:
            ValueError: the shapes of the batch differ from the recorded ones.
        """
        with self._lock:
            batch = TaskBatch.of(batch)
            if self._is_compiled:
                self._batch.check_like(batch)
                self._batch = batch
            else:
                self._batch.copy_(batch)
            return self._replay()
