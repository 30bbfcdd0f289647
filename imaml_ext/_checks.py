"""Checks of arguments that every room makes."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor


def check_integer(name: str, value: Any) -> None:
    """Raises TypeError where it is none: a float that counts would fail only when it is used."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_like(name: str, t: Tensor, b: Tensor, *shapes: Sequence[int]) -> None:
    """Raises ValueError where t is not of b's dtype and device, and of one of the shapes or b's."""
    shapes = shapes or (b.shape,)
    if t.shape not in shapes or t.dtype != b.dtype or t.device != b.device:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{name} must be {expected} {b.dtype} on {b.device}, "
            f"got {list(t.shape)} {t.dtype} on {t.device}"
        )
