"""A module with other parameters in place of its own, left afterwards as it was."""

import difflib
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._C import DisableTorchFunction

from imaml_ext.ops.parametrizations import uncached
from imaml_ext.problem.attributes import Attributes
from imaml_ext.problem.layout import Params
from imaml_ext.problem.unsupported import layer_name

_Slot = tuple[dict[str, Any], str, Tensor]  # a module's dict, the key, the tensor
_Buffer = tuple[
    str, nn.Module, str, Tensor
]  # the module's path and the module, the key, the tensor

# A second thread waits; a loss may call itself.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_REGISTERING = threading.Lock()


@contextmanager
def swapped(
    model: nn.Module,
    params: Params,
    criterion: nn.Module | None = None,
    *,
    required: Collection[str] = (),
) -> Iterator[None]:
    """Within the context, model and criterion have the tensors of `params` in place of their own.

    A tensor that is held in several places is replaced in all of them. On exit, also after an
    error, parameters and buffers are restored, and so are attributes of the modules that forward
    set to a tensor that does not outlive vmap. One thread at a time can be in this context of a
    model, or of models that share layers (if several were used before, those of the first one).

    Args:
        params: {name: tensor}; a name is looked up in the model, then in the criterion, where
            "criterion.NAME" is its second name; other names are ignored.
        required: names in `params` that the model or criterion must have.

    Raises:
        ValueError: a required name does not exist, a shape is not that of the replaced tensor, a
            norm would update its running statistics, or forward wrote to a buffer.
    """
    with _lock(model), uncached():
        attributes = Attributes()
        slots, named, buffers = _tensors(model, criterion, attributes)
        # A mode of torch functions would count what follows as uses of the tensors.
        with DisableTorchFunction():
            given = _replacements(model, named, params, required)
            used = [given.get(id(buffer), buffer) for *_, buffer in buffers]
            versions = [_version(buffer) for buffer in used]
        changed = [slot for slot in slots if id(slot[2]) in given]
        try:
            for entries, key, tensor in changed:
                entries[key] = given[id(tensor)]
            yield
            with DisableTorchFunction():
                for (path, module, key, _), buffer, version in zip(
                    buffers, used, versions, strict=True
                ):
                    if module._buffers.get(key) is not buffer or _version(buffer) != version:
                        raise ValueError(
                            f"{layer_name(path, module)} writes its buffer {key!r} in forward, "
                            "which tasks cannot share: call eval() if that prevents it, or return "
                            "the new value"
                        )
        finally:
            for entries, key, tensor in changed:
                entries[key] = tensor
            for _, module, key, buffer in buffers:
                module._buffers[key] = buffer
            attributes.restore([t for t in given.values() if id(t) not in given])


def _tensors(
    model: nn.Module, criterion: nn.Module | None, attributes: Attributes
) -> tuple[list[_Slot], Params, list[_Buffer]]:
    """Where tensors are held, the tensors by name, and the model's buffers."""
    slots: list[_Slot] = []
    named: Params = {}
    buffers: list[_Buffer] = []
    seen: set[nn.Module] = set()
    for path, module in model.named_modules(seen):
        _check_statistics(path, module)
        attributes.add(module)
        prefix = f"{path}." if path else ""
        for key, tensor in module._parameters.items():
            if tensor is not None:
                slots.append((module._parameters, key, tensor))
                named[prefix + key] = tensor
        for key, tensor in module._buffers.items():
            if tensor is not None:
                slots.append((module._buffers, key, tensor))
                named[prefix + key] = tensor
                buffers.append((path, module, key, tensor))
    for path, module in () if criterion is None else criterion.named_modules(seen):
        attributes.add(module)
        prefix = f"{path}." if path else ""
        for entries in (module._parameters, module._buffers):
            for key, tensor in entries.items():
                if tensor is not None:
                    slots.append((entries, key, tensor))
                    named.setdefault(prefix + key, tensor)
                    named.setdefault(f"criterion.{prefix}{key}", tensor)
    return slots, named, buffers


def _lock(model: nn.Module) -> threading.RLock:
    """The lock of a model, and of the models that share a layer with it."""
    lock = _LOCKS.get(model)
    if lock is None:
        with _REGISTERING:
            owners = [m for m in model.modules() if m is model or m._parameters or m._buffers]
            found = (_LOCKS[module] for module in owners if module in _LOCKS)
            lock = next(found, None) or threading.RLock()
            for module in owners:
                _LOCKS.setdefault(module, lock)
    return lock


def _check_statistics(path: str, module: nn.Module) -> None:
    if (
        isinstance(module, nn.modules.batchnorm._NormBase)
        and module.training
        and module.track_running_stats
    ):
        raise ValueError(
            f"{layer_name(path, module)} would update its running statistics, which tasks "
            "cannot share: construct it with track_running_stats=False, or call eval()"
        )


def _replacements(
    model: nn.Module, named: Params, params: Params, required: Collection[str]
) -> dict[int, Tensor]:
    """The tensors of `params` by the id of the model's tensor."""
    given: dict[int, Tensor] = {}
    for name, value in params.items():
        tensor = named.get(name)
        if tensor is None:
            tensor = _second_name(model, name)
        if tensor is None:
            if name in required:
                raise ValueError(_unknown(name, list(named)))
            continue
        if tensor.shape != value.shape:
            raise ValueError(
                f"params[{name!r}] must be of shape {list(tensor.shape)}, as in the model, "
                f"got {list(value.shape)}"
            )
        if given.setdefault(id(tensor), value) is not value:
            raise ValueError(
                f"params[{name!r}] is tied to another of {list(params)} in the model: pass a tied "
                "tensor once, as dict(model.named_parameters()) does"
            )
    return given


def _second_name(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of a module that is registered under a second name."""
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    entries = module._parameters if key in module._parameters else module._buffers
    return entries.get(key)


def _unknown(name: str, names: list[str]) -> str:
    message = f"params[{name!r}] is not a parameter of the model: "
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if name.replace(prefix, "") in names:
            return message + f"pass names without {prefix!r}, those of module_loss's own model"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return message + f"the nearest name is {nearest[0]!r}" if nearest else message + "it has none"


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
