"""Emulates TF32 matrix products on the CPU, to measure the effect of their rounding.

TF32 has float32's range and 10 of its 23 fraction bits. A GPU rounds the factors of a product to
TF32 and accumulates in float32. The emulation rounds the factors, to nearest with ties to even, and
computes the product in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DROPPED = 13  # bits
_PRODUCTS = {
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
}  # their last two arguments are the factors


def to_tf32(x: Tensor) -> Tensor:
    """Round x, [...] float32, to 11 significant bits."""
    bits = x.contiguous().view(torch.int32)
    odd = (bits >> _DROPPED) & 1
    rounded = (bits + (1 << (_DROPPED - 1)) - 1 + odd) >> _DROPPED << _DROPPED
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


class EmulatedTF32(TorchDispatchMode):
    """Rounds the factors of every matrix product of float32 tensors to TF32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = 2 if func._schema.name in _PRODUCTS else 0
        rounded = [
            to_tf32(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a
            for a in args[len(args) - factors :]
        ]
        return func(*args[: len(args) - factors], *rounded, **(kwargs or {}))
