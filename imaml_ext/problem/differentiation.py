"""Differentiating losses: where it is possible, and vector-Jacobian products."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from imaml_ext.ops.row_slices import WritingRows
from imaml_ext.problem.precision import one_precision
from imaml_ext.problem.unsupported import unsupported_layer_message


def check_inference_mode() -> None:
    """Raises RuntimeError in inference mode, where autograd is off even under enable_grad."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("imaml_ext cannot differentiate in inference mode: use no_grad")


def check_no_transform() -> None:
    """Raises RuntimeError inside torch.func's transforms and forward-mode differentiation."""
    if _functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        raise RuntimeError(
            "imaml_ext cannot run inside vmap, grad, jvp or another transform of torch.func: pass "
            "all tasks as one batch, and differentiate adapt by backward() or autograd.grad"
        )


class Computing:
    """Context of losses and their derivatives: precision, and error messages.

    Raises:
        RuntimeError: PyTorch cannot batch or differentiate an operator; with a remedy.
    """

    def __init__(self, device: torch.device) -> None:
        self._precision = one_precision(device)

    def __enter__(self) -> None:
        self._precision.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._precision.__exit__(kind, error, traceback)
        if isinstance(error, RuntimeError):
            message = unsupported_layer_message(error)
            if message is not None:
                raise RuntimeError(message) from error


def vjp(
    outputs: Tensor,
    inputs: Tensor,
    vector: Tensor,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> Tensor:
    """`vector' d outputs / d inputs`; zero where `outputs` does not depend on `inputs`."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    with torch.set_grad_enabled(create_graph), WritingRows():
        (product,) = torch.autograd.grad(
            outputs,
            inputs,
            vector,
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph,
            materialize_grads=True,
        )
    return product
