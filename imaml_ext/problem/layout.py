"""The parameter layout: named tensors as flat rows. No other module handles names and shapes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from imaml_ext.ops.batching import call_with_tasks, is_only_transform
from imaml_ext.ops.row_slices import RowSlices

Params = dict[str, Tensor]


class Layout:
    """The order and shapes of the parameters inside a flat vector of D scalars.

    Args:
        params: {name: tensor}.
        label: name of the parameters in error messages.

    Raises:
        TypeError: `params` is not a mapping of names to float32 or float64 tensors.
        ValueError: there are no parameters or all are empty, they differ in dtype or device, two
            names refer to the same tensor, or a parameter of a lazy module has no shape yet.
    """

    def __init__(self, params: Mapping[str, Tensor], label: str = "params") -> None:
        if not isinstance(params, Mapping) or not all(
            isinstance(t, Tensor) for t in params.values()
        ):
            raise TypeError(
                f"{label} must map names to tensors: pass dict(model.named_parameters())"
            )
        if not params:
            raise ValueError(f"{label} is empty: there is nothing to adapt")
        first_name, first = next(iter(params.items()))
        names: dict[int, str] = {}
        for name, tensor in params.items():
            if isinstance(tensor, UninitializedParameter):
                raise ValueError(
                    f"{label}[{name!r}] has no shape yet: call the lazy module once on an example"
                )
            if names.setdefault(id(tensor), name) != name:
                raise ValueError(
                    f"{label}[{name!r}] is the same tensor as {label}[{names[id(tensor)]!r}]: "
                    "pass a tied tensor once, as dict(model.named_parameters()) does"
                )
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{label}[{name!r}] must be float32 or float64, got {tensor.dtype}")
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"{label}[{name!r}] is {tensor.dtype} on {tensor.device}, but "
                    f"{label}[{first_name!r}] is {first.dtype} on {first.device}"
                )
        self.shapes = {name: tensor.shape for name, tensor in params.items()}
        self.sizes = [tensor.numel() for tensor in params.values()]
        self.dim = sum(self.sizes)
        if self.dim == 0:
            raise ValueError(f"{label} has only empty tensors: there is nothing to learn")
        self.dtype = first.dtype
        self.device = first.device

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal layouts."""
        return self.dtype, self.device, *self.shapes.items()

    def flatten(self, params: Mapping[str, Tensor], label: str = "params") -> Tensor:
        """[D] from tensors of the parameters' shapes, or [B, D] from tensors [B, ...]."""
        if not isinstance(params, Mapping) or not all(
            isinstance(t, Tensor) for t in params.values()
        ):
            raise TypeError(f"{label} must map names to tensors")
        if params.keys() != self.shapes.keys():
            raise ValueError(f"{label} must name {list(self.shapes)}, got {list(params)}")
        name, shape = next(iter(self.shapes.items()))
        batch = params[name].shape[: params[name].dim() - len(shape)]
        for name, shape in self.shapes.items():
            if params[name].shape != batch + shape:
                raise ValueError(
                    f"{label}[{name!r}] must be of shape {[*batch, *shape]}, "
                    f"got {list(params[name].shape)}"
                )
            self.check_like_parameters(f"{label}[{name!r}]", params[name])
        sizes = zip(self.shapes, self.sizes, strict=True)
        return torch.cat([params[name].reshape(*batch, size) for name, size in sizes], dim=-1)

    def unflatten(self, flat: Tensor) -> Params:
        """{name: [..., *shape]} from [..., D], by one split: its backward is one concatenation."""
        parts = flat.split_with_sizes(self.sizes, dim=-1)
        batch = flat.shape[:-1]
        return {
            name: part if len(shape) == 1 else part.reshape(batch + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def slices(self, row: Tensor) -> Params:
        """As `unflatten` of the row of a task that vmap maps; see `RowSlices`."""
        if not is_only_transform():
            return self.unflatten(row)
        shapes = self.shapes.values()
        slices = call_with_tasks(lambda rows: RowSlices.apply(rows, shapes, self.sizes), row)
        return dict(zip(self.shapes, slices, strict=True))

    def check_like_parameters(self, label: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(
                f"{label} is {tensor.dtype} on {tensor.device}, but the parameters are "
                f"{self.dtype} on {self.device}"
            )
