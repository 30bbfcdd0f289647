"""Whether the values of tensors may be looked at, to stop early or to refuse bad input.

On an accelerator looking would synchronise; while work is being recorded there is nothing to see
yet, and what is decided would be decided for every replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_recording: ContextVar[bool] = ContextVar("recording", default=False)


def may_look(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not _recording.get()


def is_recording() -> bool:
    return _recording.get()


@contextmanager
def recording() -> Iterator[None]:
    """Nothing may be looked at here."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)
