"""Whether tensor values may be read on the host, to stop early or to reject bad input.

On the CPU that is free. On an accelerator it waits for all work launched before. While work is
being recorded there are no values yet, and a decision would be made for every replay.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


STRIDE = 64  # iterations between polls: together they take far longer than one poll

# Whether the present recording traces the work; None outside of a recording.
_traces: ContextVar[bool | None] = ContextVar("traces", default=None)


def may_read_values(tensor: Tensor) -> bool:
    """Whether the tensor's values may be read at no cost."""
    return not (_on_accelerator(tensor) or tensor.is_meta or is_recording())


def may_synchronise(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read, if need be by waiting for the device."""
    return not (tensor.is_meta or is_tracing() or _is_capturing(tensor))


def may_poll(status: Tensor, step: int) -> bool:
    """Whether a solver may read `status` before this step, counted from 0, to stop early.

    On the CPU before every step; on an accelerator before every 64th, so that a solve of up to 64
    steps does not synchronise; never during a recording.
    """
    if not _on_accelerator(status):
        return may_read_values(status)
    due = step > 0 and step % STRIDE == 0
    return due and not (is_recording() or _is_capturing(status))


def is_recording() -> bool:
    """Whether work is being recorded, or run as a warm-up of a recording."""
    return _traces.get() is not None


def is_tracing() -> bool:
    """Whether work is being recorded by tracing, where tensors have no values."""
    return _traces.get() is True


@contextmanager
def recording(*, tracing: bool = False) -> Iterator[None]:
    """Context in which no values are read, so that every run takes the same steps.

    Args:
        tracing: whether the work is traced for compilation instead of executed.
    """
    token = _traces.set(tracing or is_tracing())
    try:
        yield
    finally:
        _traces.reset(token)


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, by this package or by the caller."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, run eagerly when its caller is compiled by `torch.compile`.

    `torch.compile` does not trace double backward passes; the code around the call is compiled.
    """
    disabled: Callable[P, T] | None = None

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # takes seconds to import; nothing is compiling
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                f"torch.compile cannot trace {function.__name__}: use RecordedMetaGradient to "
                "compile a meta-gradient"
            )
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run
