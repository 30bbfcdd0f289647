"""Attributes of modules that hold tensors of a task, which do not outlive vmap."""

from collections import deque
from collections.abc import Collection
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), Tensor, nn.Parameter})
NOT_SEARCHED = (Tensor, nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
_DEPTH = 3  # of containers in containers; an object counts as two
_MOST_ENTRIES = 1000  # longer containers, such as vocabularies, are not searched


class Attributes:
    """The attributes of modules, and the entries of lists, dicts, sets and objects in them."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, Any]] = []  # containers, and copies of them
        self._seen: set[int] = set()

    def add(self, module: nn.Module) -> None:
        attributes = vars(module)
        self._before.append((attributes, attributes.copy()))
        self._before.append((module._buffers, module._buffers.copy()))
        # PyTorch's own layers keep nothing, unless a hook does.
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or not type(module).__module__.startswith("torch.nn.modules.")
        ):
            for name in attributes.keys() - _OF_EVERY_MODULE:
                self._add_containers(attributes[name], _DEPTH)

    def restore(self, given: Collection[Tensor]) -> None:
        """Restore what now holds a tensor of vmap, or one of `given`.

        A dict is restored entry by entry, so that a counter in it keeps its new value.
        """
        for container, before in self._before:
            if len(container) == len(before) and all(map(is_, _items(container), _items(before))):
                continue
            if isinstance(container, dict):
                for key, value in list(container.items()):
                    if value is not before.get(key) and _holds_task(value, given, _DEPTH):
                        if key in before:
                            container[key] = before[key]
                        else:
                            del container[key]
            elif any(_holds_task(value, given, _DEPTH) for value in container):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(before)

    def _add_containers(self, value: Any, depth: int) -> None:
        if type(value) in _PLAIN or id(value) in self._seen:
            return
        self._seen.add(id(value))
        for container, below in _containers(value, depth):
            if isinstance(container, dict):
                self._before.append((container, dict(container)))
            elif not isinstance(container, (tuple, frozenset)):
                self._before.append((container, container.copy()))
            for item in _items(container):
                self._add_containers(item, below)


def _containers(value: Any, depth: int) -> list[tuple[Any, int]]:
    """What holds the parts of a value, itself or its `__dict__`, and the depth left in them."""
    found = []
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        found.append((value, depth - 1))
    if hasattr(value, "__dict__") and not isinstance(value, NOT_SEARCHED):
        found.append((vars(value), depth - 2))
    return [(c, below) for c, below in found if below >= 0 and len(c) <= _MOST_ENTRIES]


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _holds_task(value: Any, given: Collection[Tensor], depth: int) -> bool:
    if isinstance(value, Tensor):
        return _functorch.is_functorch_wrapped_tensor(value) or any(value is t for t in given)
    return any(
        _holds_task(item, given, below)
        for container, below in _containers(value, depth)
        for item in _items(container)
    )
