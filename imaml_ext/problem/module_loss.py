"""A loss built from a module and a criterion."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils import _pytree as pytree

from imaml_ext._tracing import may_synchronise
from imaml_ext.ops.vmap_forms import VmapForms, vmap_forms
from imaml_ext.problem.layout import Params
from imaml_ext.problem.outputs import OutputParts
from imaml_ext.problem.swapping import swapped
from imaml_ext.problem.unsupported import innermost_layer, unsupported_layer_message

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")
_OF_ONE_TASK = " of one task)"
_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


class ModuleLoss:
    """`criterion(model(x), y)` as a function of the model's parameters, for one task."""

    def __init__(self, model: nn.Module, criterion: Callable[[Any, Any], Tensor]) -> None:
        _check_model(model)
        _check_criterion(criterion, model)
        self.model = model
        self.criterion = criterion
        self.uses_outputs_only = False  # the criterion, as far as is known

    def __call__(self, params: Params, data: tuple[Any, Any]) -> Tensor:
        x, y = self.pair(data)
        with self._swapped(params, _adapted(params)), vmap_forms():
            return self._criterion(self._forward(x), y)

    def outputs(self, params: Params, x: Any) -> Any:
        """`model(x)`. `params` may have other names too, such as those of hyper-parameters."""
        with self._swapped(params), vmap_forms():
            return self._forward(x)

    def of_outputs(self, outputs: Any, y: Any, shared: Params) -> Tensor:
        """`criterion(outputs, y)`, with `shared` in place of the model's and the criterion's."""
        with self._swapped(shared) if shared else nullcontext(), vmap_forms():
            return self._criterion(outputs, y)

    def parts_and_loss(
        self, params: Params, copies: Params, data: Any, parts: OutputParts
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The parts of `model(x)`, and the criterion while the model has what forward stored.

        For the criterion, the outputs are detached and the model has `copies` of the parameters.
        Random numbers that it draws are drawn again by the next call.
        """
        x, y = self.pair(data)
        with self._swapped(params), vmap_forms():
            z, constants = parts.take_apart(self._forward(x))
            devices = [z.device] if z.is_cuda else []
            with self._swapped(copies), torch.random.fork_rng(devices, enabled=may_synchronise(z)):
                outputs = parts.put_together(z.detach(), constants)
                return z, constants, self._criterion(outputs, y)

    def _swapped(
        self, params: Params, required: Collection[str] = ()
    ) -> AbstractContextManager[None]:
        criterion = self.criterion if isinstance(self.criterion, nn.Module) else None
        return swapped(self.model, params, criterion, required=required)

    def _forward(self, x: Any) -> Any:
        try:
            return self.model(x)
        except _ERRORS as error:
            layer = innermost_layer(error.__traceback__) or type(self.model).__name__
            _raise(error, layer, f"model(x) with x {_described(x)}")

    def _criterion(self, outputs: Any, y: Any) -> Tensor:
        try:
            return self.criterion(outputs, y)
        except _ERRORS as error:
            operands = f"outputs {_described(outputs)} and y {_described(y)}"
            _raise(error, "the criterion", f"criterion(outputs, y) with {operands}")

    @staticmethod
    def pair(data: Any) -> tuple[Any, Any]:
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise TypeError(
                f"support and query must be pairs (x, y) for module_loss, got {type(data).__name__}"
            )
        return data[0], data[1]


def module_loss(model: nn.Module, criterion: Callable[[Any, Any], Tensor]) -> ModuleLoss:
    """`(params, (x, y)) -> criterion(model(x), y)`: a scalar, for one task.

    `params` maps names of the model's parameters to tensors; a missing parameter keeps the model's
    value and is not adapted. Names that the model does not have are those of a criterion that is a
    module; "criterion.NAME" is the name of its parameter NAME if the model has one of that name.
    The model runs in its current mode, and has the given parameters while the criterion runs, too.
    Its buffers may be read but not written in forward: use
    `nn.BatchNorm2d(..., track_running_stats=False)`. The model is left as it was: an attribute that
    forward sets to a tensor of a task is restored. Threads whose models share
    layers wait for each other.

    Args:
        model: called with x, [N, ...] or a pytree of such tensors, as its one argument.
        criterion: maps the model's outputs and y to a 0-d tensor, such as
            `torch.nn.functional.mse_loss` or `nn.MSELoss()`; `curvature="ggn"` differentiates it
            twice by the outputs, so that it must not use adapted parameters there, nor other
            tensors that forward computes.

    Returns:
        The loss; `loss.outputs(params, x)` are the model's outputs. Calling it raises a ValueError
        if forward writes a buffer, or if the model has no adapted parameter of a name or shape in
        `params`; a TypeError if the data are not a pair (x, y). Errors of torch in forward and in
        the criterion keep their type, and name the layer and the shapes of one task.

    Raises:
        TypeError: the model is not a module, or one that distributes or compiles its computations;
            `criterion` is a class, the model, or another loss of parameters and data.
    """
    return ModuleLoss(model, criterion)


def call_loss(loss: Callable[[Params, Any], Any], params: Params, data: Any) -> Any:
    """`loss(params, data)`; errors name any loss, and the shapes of one task."""
    try:
        return loss(params, data)
    except _ERRORS as error:
        if isinstance(loss, ModuleLoss) or str(error).endswith(_OF_ONE_TASK):
            raise
        name = getattr(loss, "__name__", type(loss).__name__)
        given = f"params {_described(params)} and data {_described(data)}"
        _raise(error, f"the loss {name}", f"loss(params, data) with {given}")


def _check_model(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise TypeError(f"model must be an nn.Module, got the class {name}: pass {name}(...)")
    if not isinstance(model, nn.Module):
        name = f"the {type(model).__name__} {getattr(model, '__name__', '')}".rstrip()
        raise TypeError(f"model must be an nn.Module, got {name}: module_loss(model, criterion)")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError("module_loss cannot use a scripted module: pass the original module")
        kinds = {kind.__name__ for kind in type(module).__mro__}
        wrapper = next((name for name in _WRAPPERS if name in kinds), None)
        if wrapper:
            raise TypeError(
                f"module_loss cannot use {wrapper}, which would not average the meta-gradients: "
                "pass model.module, and average the gradients as Trainer(process_group=...) does, "
                "see docs/distributed.md"
            )


def _check_criterion(criterion: Any, model: nn.Module) -> None:
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(f"criterion must be a function, got the class {name}: pass {name}()")
    if not callable(criterion) or isinstance(criterion, ModuleLoss) or criterion is model:
        what = "the model itself" if criterion is model else type(criterion).__name__
        raise TypeError(
            f"criterion must be a function of the model's outputs and y, such as nn.MSELoss(), got "
            f"{what}"
        )


def _adapted(params: Params) -> Collection[str]:
    """Names that the model must have. What is shared may be of another loss.

    It is not vmapped by an Objective; under another vmap, it cannot be told from phi.
    """
    if _functorch.maybe_current_level() is None:
        return params.keys()
    if VmapForms.depth() == 0:
        return ()
    return [name for name, tensor in params.items() if _functorch.is_batchedtensor(tensor)]


def _raise(error: Exception, where: str, call: str) -> NoReturn:
    """Raise an error of the same type, in one line, with where it was raised and the shapes."""
    supported = not isinstance(error, RuntimeError) or unsupported_layer_message(error) is None
    if not supported or type(error).__module__ != "builtins":
        raise error
    text = str(error) or type(error).__name__
    message = f"{where}: {text.splitlines()[0].rstrip('.')} (in {call}{_OF_ONE_TASK}"
    raise type(error)(message) from error


def _described(value: Any) -> str:
    """Shapes and dtypes of the first tensors."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    shown = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in leaves[:3]]
    more = ["..."] if len(leaves) > 3 else []
    return ", ".join(shown + more) or type(value).__name__
