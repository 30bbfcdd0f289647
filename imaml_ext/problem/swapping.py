"""A module with other parameters in place of its own, left afterwards as it was."""

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch._C import DisableTorchFunction

from imaml_ext.problem.attributes import Attributes
from imaml_ext.problem.layout import Params
from imaml_ext.problem.unsupported import layer_name


@contextmanager
def swapped(
    model: nn.Module, params: Params, *others: nn.Module, required: Collection[str] = ()
) -> Iterator[None]:
    """Within the context, the model has the tensors of `params` in place of its own.

    A tensor that the model holds in several places is replaced in all of them. On exit, also after
    an error, parameters and buffers are restored, and so are attributes of the modules that
    forward set to a tensor that does not outlive vmap.

    Args:
        params: {name: tensor}; names that the model does not have are ignored.
        others: further modules whose attributes are restored.
        required: names in `params` that the model must have.

    Raises:
        ValueError: the model lacks a name, a shape is not that of the model's tensor, a norm would
            update its running statistics, or forward wrote to a buffer.
    """
    named: Params = {}
    slots, buffers, attributes = [], [], Attributes()
    for path, module in model.named_modules():
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
    for other in others:
        for module in other.modules():
            attributes.add(module)
    with DisableTorchFunction():  # a mode would be called for each shape
        given = _replacements(model, named, params, required)
    changed = [slot for slot in slots if id(slot[2]) in given]
    try:
        for entries, key, tensor in changed:
            entries[key] = given[id(tensor)]
        used = [given.get(id(buffer), buffer) for *_, buffer in buffers]
        versions = [_version(buffer) for buffer in used]
        yield
        for (path, module, key, _), buffer, version in zip(buffers, used, versions, strict=True):
            if module._buffers.get(key) is not buffer or _version(buffer) != version:
                raise ValueError(
                    f"{layer_name(path, module)} writes its buffer {key!r} in forward, which tasks "
                    "cannot share: call eval() if that prevents it, or return the new value"
                )
    finally:
        for entries, key, tensor in changed:
            entries[key] = tensor
        for _, module, key, buffer in buffers:
            module._buffers[key] = buffer
        attributes.restore([t for t in given.values() if id(t) not in given])


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
