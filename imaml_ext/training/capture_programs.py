"""Recording work on the CPU: losses and their derivatives as programs."""

from collections.abc import Callable
from typing import Any

from imaml_ext._tracing import T
from imaml_ext.problem.programs import Programs


def compiled(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """`function`, with programs instead of PyTorch's operators for its losses; a `Capture`.

    `function` is called once. See `Programs` for what is recorded, and when it is recorded again.

    Args:
        function, warmup: as in `Capture`; `warmup` is not called.

    Raises:
        RuntimeError: a loss cannot be recorded; the message has the cause.
    """
    programs = Programs()

    def replay() -> T:
        with programs.use():
            result = function()
        programs.check()
        return result

    replay()
    return replay
