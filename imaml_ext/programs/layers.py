"""The operators of this package's layers as instructions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import imaml_ext.ops.batch_norm  # noqa: F401 - registers the operators
from imaml_ext.programs.arrays import Array

_Shapes = Sequence[Sequence[int]]
_Settings = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Layer:
    """How the arguments of an operator become those of an instruction.

    Attributes:
        name: of the instruction in csrc/cpu/program_layers.cpp.
        tensors: the number of arguments that are tensors; None is left out.
        settings: integers and scalars of the instruction, from the arguments and the shapes of the
            results.
    """

    name: str
    tensors: int
    settings: Callable[[Sequence[Any], _Shapes], _Settings]

    def operands(self, args: Sequence[Any]) -> list[Array]:
        return [a for a in args[: self.tensors] if a is not None]


def _conv(x: Sequence[int], y: Sequence[int], w: Sequence[int], window: Sequence[int]) -> _Settings:
    """From the shapes of images [1, N, H, W, C], outputs and weights [1, O, C, kH, kW]."""
    return (*x[1:], *y[2:4], w[1], *w[3:], *window), ()


LAYERS: dict[Any, Layer] = {
    torch.ops.imaml.conv.default: Layer(
        "conv", 3, lambda a, r: _conv(a[0].shape, r[0], a[1].shape, a[3:7])
    ),
    torch.ops.imaml.conv_data_gradient.default: Layer(
        "conv_data_gradient", 2, lambda a, r: _conv(r[0], a[0].shape, a[1].shape, a[4:8])
    ),
    torch.ops.imaml.conv_weight_gradient.default: Layer(
        "conv_weight_gradient", 2, lambda a, r: _conv(a[0].shape, a[1].shape, r[0], a[4:8])
    ),
    torch.ops.imaml.batch_norm.default: Layer(
        "batch_norm", 3, lambda a, r: ((*a[0].shape[1:], int(a[4])), (float(a[3]),))
    ),
    torch.ops.imaml.batch_norm_backward.default: Layer(
        "batch_norm_backward", 6, lambda a, r: ((*a[0].shape[1:], int(a[6])), ())
    ),
    torch.ops.imaml.batch_norm_double_backward.default: Layer(
        "batch_norm_double_backward", 9, lambda a, r: ((*a[0].shape[1:], int(a[9])), ())
    ),
}
