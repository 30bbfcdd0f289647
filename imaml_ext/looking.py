"""Whether the values of tensors may be read on the host, to stop early or to refuse bad input.

On the CPU that is free. On an accelerator it waits for everything that was launched before. While
work is being recorded there is nothing to read yet, and what is decided would be decided for every
replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from imaml_ext.solution import Status

STRIDE = 64  # iterations that cost far more than one wait, and more than any default takes

_recording: ContextVar[bool] = ContextVar("recording", default=False)
_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


def may_look(tensor: Tensor) -> bool:
    """Whether its values may be read at no cost."""
    return not (_on_accelerator(tensor) or tensor.is_meta or is_recording())


def all_done(status: Tensor, step: int) -> bool:
    """Whether no task is RUNNING, as far as that may be asked before this step, counted from 0.

    On the CPU it is asked before every step. On an accelerator, where asking waits for the device,
    it is asked before every 64th, and never while work is being recorded: a solve of up to 64 steps
    synchronises nothing.
    """
    if _on_accelerator(status):
        asked = step > 0 and step % STRIDE == 0 and not (is_recording() or _is_capturing(status))
    else:
        asked = may_look(status)
    return asked and not bool((status == Status.RUNNING).any())


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
