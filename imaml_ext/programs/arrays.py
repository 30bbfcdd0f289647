"""Strided arrays of one task, and views of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from imaml_ext.programs.operators import UnsupportedOperator

Kind = Literal["float", "int", "bool"]  # all are stored as floats


@dataclass(eq=False)
class Buffer:
    """Contiguous memory for `size` elements of one task.

    Attributes:
        input: the dtype of an input; None if the program writes the buffer.
        constant: the value of all its elements; its size is 1.
    """

    size: int
    input: torch.dtype | None = None
    constant: float | None = None


@dataclass(frozen=True, eq=False)
class Array:
    """A strided view of a buffer; offset and strides count elements."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    kind: Kind = "float"

    @staticmethod
    def new(
        shape: Sequence[int], kind: Kind = "float", input: torch.dtype | None = None
    ) -> "Array":
        """A contiguous array in a new buffer."""
        like = torch.empty(tuple(shape), device="meta")
        return Array(Buffer(like.numel(), input), tuple(shape), like.stride(), kind=kind)

    @staticmethod
    def filled(value: float, shape: Sequence[int], kind: Kind = "float") -> "Array":
        buffer = Buffer(1, constant=float(value))
        return Array(buffer, tuple(shape), (0,) * len(shape), kind=kind)

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_contiguous(self) -> bool:
        return self._meta().is_contiguous()

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its buffer, in order."""
        return self.is_contiguous and self.offset == 0 and self.size == self.buffer.size

    @property
    def identity(self) -> Any:
        """Equal for arrays of one shape that have the same values."""
        if self.buffer.constant is not None:
            return repr(self.buffer.constant)  # equal for NaN, different for -0.0 and 0.0
        return self.buffer, self.offset, self.strides

    def with_kind(self, kind: Kind) -> "Array":
        """The same numbers.

        Raises:
            UnsupportedOperator: the conversion changes numbers.
        """
        order = ("bool", "int", "float")
        if order.index(kind) < order.index(self.kind):
            raise UnsupportedOperator(f"a conversion of {self.kind} to {kind}")
        return replace(self, kind=kind)

    def dimensions(self, dims: Sequence[int] | None) -> tuple[int, ...]:
        """Dimensions counted from 0; all if none are given."""
        count = len(self.shape)
        return tuple(d % count for d in dims) if dims and count else tuple(range(count))

    def expanded(self, shape: Sequence[int]) -> "Array":
        return self.view(lambda t: t.expand(tuple(shape)))

    def view(self, function: Callable[[Tensor], Tensor]) -> "Array":
        """The array that `function` returns for a tensor of these strides.

        Raises:
            RuntimeError: there is no such view.
        """
        return self._of(function(self._meta()))

    def views(self, function: Callable[[Tensor], Sequence[Tensor]]) -> list["Array"]:
        """As `view`, for several views."""
        return [self._of(view) for view in function(self._meta())]

    def _of(self, view: Tensor) -> "Array":
        return replace(
            self,
            shape=tuple(view.shape),
            strides=view.stride(),
            offset=int(view.storage_offset()),
        )

    def _meta(self) -> Tensor:
        extent = self.offset + 1
        extent += sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n)
        memory = torch.empty(extent, device="meta")
        return memory.as_strided(self.shape, self.strides, self.offset)


def placed_dimensions(a: Array, shape: Sequence[int], dims: Sequence[int]) -> Array:
    """The array, expanded to `shape`, with its dimensions in the places `dims`."""

    def view(t: Tensor) -> Tensor:
        for d in range(len(shape)):
            t = t if d in dims else t.unsqueeze(d)
        return t.expand(tuple(shape))

    return a.view(view)


def indexed(a: Array, dim: int, shape: Sequence[int]) -> tuple[Array, int]:
    """The array at index 0 of `dim`, of this shape, and the stride of `dim`."""
    dim %= max(len(a.shape), 1)

    def first(t: Tensor) -> Tensor:
        t = t[tuple(slice(1) if d == dim else slice(n) for d, n in enumerate(shape))]
        return t.expand(tuple(shape))

    return a.view(first), a.strides[dim]
