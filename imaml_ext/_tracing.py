"""Whether the values of tensors may be read on the host, to stop early or to refuse bad input.

On the CPU that is free. On an accelerator it waits for everything that was launched before. While
work is being recorded there is nothing to read yet, and what is decided would be decided for every
replay.
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


STRIDE = 64  # iterations between polls: they cost far more than one wait

_recording: ContextVar[bool] = ContextVar("recording", default=False)
_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


def may_read_values(tensor: Tensor) -> bool:
    """Whether its values may be read at no cost."""
    return not (_on_accelerator(tensor) or tensor.is_meta or is_recording())


def may_poll(status: Tensor, step: int) -> bool:
    """Whether a solver may read `status` before this step, counted from 0, to stop early.

    On the CPU before every step. On an accelerator, where reading waits for the device, before
    every 64th, and never during a recording: a solve of up to 64 steps does not synchronise.
    """
    if not _on_accelerator(status):
        return may_read_values(status)
    due = step > 0 and step % STRIDE == 0
    return due and not (is_recording() or _is_capturing(status))


def is_recording() -> bool:
    """Whether this is a recording or a rehearsal of one."""
    return _recording.get()


def is_tracing() -> bool:
    """Whether this is a recording by tracing, where tensors have no values."""
    return _tracing.get()


@contextmanager
def recording(*, tracing: bool = False) -> Iterator[None]:
    """Nothing is read here, so that every run takes the same steps.

    Args:
        tracing: the work is traced to be compiled, not executed.
    """
    tokens = _recording.set(True), _tracing.set(tracing or is_tracing())
    try:
        yield
    finally:
        _recording.reset(tokens[0])
        _tracing.reset(tokens[1])


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, ours or that of a caller."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, left as it is by a `torch.compile` of what calls it.

    `torch.compile` traces no double backward pass; what is around the call is compiled.
    """
    disabled: Callable[P, T] | None = None

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # seconds to import, and nothing can be compiling
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                f"{function.__name__} is not for torch.compile to trace: RecordedMetaGradient "
                "compiles a meta-gradient"
            )
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run
