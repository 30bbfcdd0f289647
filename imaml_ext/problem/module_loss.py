"""A loss built from a module and a criterion."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from imaml_ext.problem.layout import Params
from imaml_ext.problem.unsupported import layer_name


class ModuleLoss:
    """`criterion(model(x), y)` as a function of the model's parameters, for one task."""

    def __init__(self, model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        if isinstance(criterion, type):
            name = criterion.__name__
            raise TypeError(f"criterion must be a function, got the class {name}: pass {name}()")
        self.model = model
        self.criterion = criterion

    def outputs(self, params: Params, x: Any) -> Tensor:
        buffers = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and (
                module.training and module.track_running_stats
            ):
                raise ValueError(
                    f"{layer_name(name, module)} would update its running statistics, which tasks "
                    "cannot share: construct it with track_running_stats=False, or call eval()"
                )
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    buffers.append((name, module, key, buffer, _version(buffer)))
        outputs: Tensor = functional_call(self.model, params, (x,))
        for name, module, key, buffer, version in buffers:
            if module._buffers[key] is not buffer or _version(buffer) != version:
                module._buffers[key] = buffer  # it may hold a vmap tensor
                raise ValueError(
                    f"{layer_name(name, module)} writes its buffer {key!r} in forward, which tasks "
                    "cannot share: call eval() if that prevents it, or return the new value"
                )
        return outputs

    def __call__(self, params: Params, data: tuple[Any, Any]) -> Tensor:
        x, y = self.pair(data)
        return self.criterion(self.outputs(params, x), y)

    @staticmethod
    def pair(data: Any) -> tuple[Any, Any]:
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise TypeError(
                f"support and query must be pairs (x, y) for module_loss, got {type(data).__name__}"
            )
        return data[0], data[1]


def module_loss(model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> ModuleLoss:
    """`(params, (x, y)) -> criterion(model(x), y)`: a scalar, for one task.

    `params` maps names of the model's parameters to tensors; a missing parameter keeps the model's
    value and is not adapted. The model runs in its current mode. Its buffers may be read but not
    written in forward: use `nn.BatchNorm2d(..., track_running_stats=False)`.

    Args:
        model: called with x, [N, ...] or a pytree of such tensors, as its one argument.
        criterion: maps the model's outputs and y to a 0-d tensor, such as
            `torch.nn.functional.mse_loss` or `nn.MSELoss()`; `curvature="ggn"` differentiates it
            twice.

    Returns:
        The loss; `loss.outputs(params, x)` are the model's outputs. Calling it raises a ValueError
        if forward writes a buffer, and a TypeError if the data are not a pair (x, y).

    Raises:
        TypeError: `criterion` is a class.
    """
    return ModuleLoss(model, criterion)


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
