"""A loss built from a module and a criterion."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from imaml_ext.problem.layout import Params
from imaml_ext.problem.swapping import swapped


class ModuleLoss:
    """`criterion(model(x), y)` as a function of the model's parameters, for one task."""

    def __init__(self, model: nn.Module, criterion: Callable[[Any, Any], Tensor]) -> None:
        if isinstance(criterion, type):
            name = criterion.__name__
            raise TypeError(f"criterion must be a function, got the class {name}: pass {name}()")
        self.model = model
        self.criterion = criterion

    def __call__(self, params: Params, data: tuple[Any, Any]) -> Tensor:
        x, y = self.pair(data)
        with self._swapped(params):
            return self.criterion(self.model(x), y)

    def outputs(self, params: Params, x: Any) -> Any:
        """`model(x)`. `params` may have further names, such as those of hyper-parameters."""
        with self._swapped(params):
            return self.model(x)

    def of_outputs(self, params: Params, outputs: Any, y: Any) -> Tensor:
        """`criterion(outputs, y)`, with `params` in place of the model's."""
        with self._swapped(params):
            return self.criterion(outputs, y)

    def _swapped(self, params: Params) -> AbstractContextManager[None]:
        others = (self.criterion,) if isinstance(self.criterion, nn.Module) else ()
        return swapped(self.model, params, *others)

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
