"""A stand-in for CUDA graphs on the CPU, which records and replays operators."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext._tracing import recording


class Tape:
    """A `Capture` that keeps what CUDA graphs keep: operators, memory, and numbers from the host.

    Recording restores the memory that it writes.

    Args:
        refuses: an operator that raises the error of a CUDA library when it is recorded.
    """

    def __init__(self, refuses: Any = None) -> None:
        self.recordings = self.replays = 0
        self.refuses = refuses

    def __call__(self, function: Callable[[], Any], warmup: Callable[[], Any]) -> Callable:
        with recording():
            warmup()
            recorder = _Recorder(self.refuses)
            try:
                with recorder:
                    result = function()
            finally:
                for storage, content in recorder.before.values():
                    storage.copy_(content)
        self.recordings += 1

        def replay() -> Any:
            self.replays += 1
            with torch.no_grad():
                for call in recorder.calls:
                    _run_again(*call)
            return pytree.tree_map(lambda leaf: leaf, result)

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self, refuses: Any) -> None:
        super().__init__()
        self.refuses = refuses
        self.calls: list[tuple] = []
        self.before: dict[int, tuple] = {}  # contents of written memory
        self._created: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is self.refuses:
            raise RuntimeError(f"cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR in {func}\n(more)")
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._created | self.before.keys():
                self.before[storage._cdata] = (storage, storage.clone())
        known = {_memory(t) for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self._created |= {_memory(t) for t in _tensors(out)} - known
        self.calls.append((func, args, kwargs, out))
        return out


def _run_again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if not func._schema.is_mutable:
        inputs = {_memory(t) for t in _tensors((args, kwargs))}
        if all(_memory(t) in inputs for t in _tensors(out)):
            return  # a view of existing memory
    again = func(*args, **kwargs)
    for old, new in zip(_tensors(out), _tensors(again), strict=True):
        if _memory(old) != _memory(new):
            old.detach().copy_(new)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
