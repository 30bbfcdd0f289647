"""Checks of arguments. Messages state the name, what was expected and what was given."""

import inspect
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

_WORDS = {
    "(0, inf)": "positive and finite",
    "[0, inf)": "finite and non-negative",
    "[1, inf)": "finite and at least 1",
}


def check_integer(name: str, value: Any, minimum: int | None = None) -> None:
    """Raises TypeError for anything but an integer, ValueError below the minimum."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_range(name: str, value: Any, interval: str) -> None:
    """Raises TypeError for anything but a real number, ValueError outside the interval.

    Args:
        interval: in mathematical notation, such as "[0, 1)" or "(0, inf)".
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    low, high = map(float, interval[1:-1].split(","))
    number: Any = value
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name} must be {_WORDS.get(interval, f'in {interval}')}, got {value}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError for anything but one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_instance(name: str, value: Any, kind: type, remedy: str) -> None:
    """Raises TypeError, with a remedy, for anything but an instance of the class."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be an instance of {kind.__name__}, got {kind_of(value)}: {remedy}"
        )


def check_callable(name: str, value: Any, parameters: str, remedy: str = "") -> None:
    """Raises TypeError for anything that cannot be called with these parameters.

    Args:
        parameters: such as "(params, data)".
        remedy: added to the message.
    """
    got = kind_of(value)
    if callable(value) and not isinstance(value, type):
        try:
            signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
        except (TypeError, ValueError):  # some builtins have none
            return
        try:
            signature.bind(*parameters.split(","))
            return
        except TypeError:
            got = f"{getattr(value, '__name__', got)}({', '.join(signature.parameters)})"
    remedy = f": {remedy}" if remedy else ""
    raise TypeError(f"{name} must be a function of {parameters}, got {got}{remedy}")


def check_not_of_torch(name: str, value: Any, parameters: str, remedy: str) -> None:
    """Raises TypeError for a layer or function of torch.nn, which has other parameters."""
    if str(getattr(value, "__module__", "")).startswith("torch.nn."):
        got = getattr(value, "__name__", type(value).__name__)
        raise TypeError(f"{name} must be a function of {parameters}, got torch's {got}: {remedy}")


def check_scalar(name: str, value: Any) -> None:
    """Raises TypeError for anything but a real tensor, ValueError for one that is not 0-d."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor, got {kind_of(value)}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    if value.dim() != 0:
        raise ValueError(
            f"{name} of one task must be a scalar, got shape {list(value.shape)}: "
            "return its mean or sum"
        )


def kind_of(value: Any) -> str:
    """How messages name what was given."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_like(name: str, t: Tensor, b: Tensor, *shapes: Sequence[int]) -> None:
    """Raises ValueError unless t has b's dtype and device, and one of the shapes (default: b's)."""
    shapes = shapes or (b.shape,)
    if t.shape not in shapes or t.dtype != b.dtype or t.device != b.device:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{name} must be {expected} {b.dtype} on {b.device}, "
            f"got {list(t.shape)} {t.dtype} on {t.device}"
        )
