"""The parameter layout: named tensors as flat rows. Nothing else knows names and shapes."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from imaml_ext.looking import may_look

Params = dict[str, Tensor]
Lam = float | Tensor | Mapping[str, Tensor]


class Layout:
    """The order and shapes of the parameters inside a flat vector of D scalars.

    Args:
        params: {name: tensor}.
        label: what messages call them.

    Raises:
        TypeError: `params` is not a mapping of names to float32 or float64 tensors.
        ValueError: there are no parameters or all are empty, they differ in dtype or device, one is
            there under two names, or one has no shape yet.
    """

    def __init__(self, params: Mapping[str, Tensor], label: str = "params") -> None:
        if not isinstance(params, Mapping) or not all(
            isinstance(t, Tensor) for t in params.values()
        ):
            raise TypeError(f"{label} must map names to tensors, as dict(model.named_parameters())")
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
                    f"{label}[{name!r}] is {label}[{names[id(tensor)]!r}]: name a tied tensor "
                    "once, as dict(model.named_parameters()) does"
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
            raise ValueError(f"{label} hold no scalars: there is nothing to learn")
        self.dtype = first.dtype
        self.device = first.device

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
            self._check_like_parameters(f"{label}[{name!r}]", params[name])
        sizes = zip(self.shapes, self.sizes, strict=True)
        return torch.cat([params[name].reshape(*batch, size) for name, size in sizes], dim=-1)

    def unflatten(self, flat: Tensor) -> Params:
        """{name: [..., *shape]} from [..., D], by one split: its backward is one concatenation."""
        parts = flat.split(self.sizes, dim=-1)
        batch = flat.shape[:-1]
        return {
            name: part.reshape(batch + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten_lam(self, lam: Any) -> Tensor:
        """Λ without names: [1] for a scalar, [D] for a diagonal, [D, D] dense; differentiable.

        Values are checked here on the CPU. On CUDA that would synchronise: `implicit` marks the
        tasks instead.

        Raises:
            TypeError, ValueError: not of a form or shape that is known, not positive (definite),
                not symmetric, not finite.
        """
        if isinstance(lam, Mapping):
            if lam.keys() != self.shapes.keys():
                raise ValueError(f"lam must name {list(self.shapes)}, got {list(lam)}")
            flat = torch.cat([self._diagonal_part(name, lam[name]) for name in self.shapes])
        elif isinstance(lam, Tensor):
            if lam.shape not in ((), (self.dim, self.dim)):
                raise ValueError(
                    f"a lam tensor must be 0-d, or dense [{self.dim}, {self.dim}], "
                    f"got shape {list(lam.shape)}"
                )
            self._check_like_parameters("lam", lam)
            flat = lam.reshape(1) if lam.dim() == 0 else lam
        elif isinstance(lam, Real) and not isinstance(lam, bool):
            if not _is_positive_in(self.dtype, lam):
                raise ValueError(f"lam must be positive and finite, got {lam}, in {self.dtype}")
            return torch.full((1,), float(lam), dtype=self.dtype, device=self.device)
        else:
            raise TypeError(
                f"lam must be a float, a tensor or a dict of tensors, got {type(lam).__name__}"
            )
        if may_look(flat) and not bool(is_positive(flat)):
            if flat.dim() == 2:
                raise ValueError("a dense lam must be finite, symmetric and positive definite")
            raise ValueError("lam must be positive and finite in every entry")
        return flat

    def _diagonal_part(self, name: str, lam: Tensor) -> Tensor:
        shape = self.shapes[name]
        self._check_like_parameters(f"lam[{name!r}]", lam)
        if lam.dim() != 0 and lam.shape != shape:
            raise ValueError(
                f"lam[{name!r}] must be 0-d or of shape {list(shape)}, got {list(lam.shape)}"
            )
        return lam.expand(shape).reshape(-1)

    def _check_like_parameters(self, label: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(
                f"{label} is {tensor.dtype} on {tensor.device}, but the parameters are "
                f"{self.dtype} on {self.device}"
            )


def check_integer(name: str, value: Any) -> None:
    """Raises TypeError where it is none: a float that counts would fail only when it is used."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _is_positive_in(dtype: torch.dtype, number: Any) -> bool:
    """Whether it is neither 0 nor infinite in this dtype."""
    info = torch.finfo(dtype)
    return bool(info.smallest_normal * info.eps <= number <= info.max)


def matrix_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix` in the dtype of the rows, under autocast too."""
    device = rows.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return rows @ matrix
    with torch.autocast(device, enabled=False):
        return rows @ matrix


def is_positive(flat_lam: Tensor) -> Tensor:
    """Whether Λ is finite, symmetric and positive definite: one bool, still on the device."""
    finite = flat_lam.isfinite().all()
    if flat_lam.dim() == 1:
        return finite & (flat_lam > 0).all()
    matrix = flat_lam.detach()
    slack = 16 * torch.finfo(matrix.dtype).eps * matrix.abs().amax()
    symmetric = ((matrix - matrix.T).abs() <= slack).all()
    _, info = torch.linalg.cholesky_ex(torch.where(finite, matrix, 0.0))
    definite: Tensor = info == 0
    return finite & symmetric & definite
