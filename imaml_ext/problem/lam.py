"""Λ, the proximal strength: the forms that users pass, and the operator built from them."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from imaml_ext._checks import check_choice, check_like, check_range
from imaml_ext._tracing import may_read_values
from imaml_ext.problem.layout import Layout

Lam = float | Tensor | Mapping[str, Tensor]

Form = Literal["scalar", "tensor", "diagonal", "dense"]


class LamOperator:
    """Λ as a symmetric matrix that acts on rows [B, D]: scalar, diagonal or dense.

    The fused kernels add a scalar or a diagonal Λ themselves; a dense one is added in PyTorch.

    Attributes:
        values: [1] for a scalar, [D] for a diagonal, [D, D] for a dense matrix.
        is_dense: whether it is a dense matrix.
        fused: the values for the kernels, [1] or [D]; 0 for a dense matrix.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.is_dense = values.dim() == 2
        self.fused = values.new_zeros(1) if self.is_dense else values

    def mv(self, rows: Tensor) -> Tensor:
        """`Λ rows_i` for every row, [B, D]."""
        return _matmul(rows, self.values) if self.is_dense else rows * self.values

    def add_unfused(self, rows: Tensor, phi: Tensor, theta: Tensor | None = None) -> Tensor:
        """`rows + Λ (phi - theta)` for a dense Λ, else `rows`: the kernels add the product."""
        if not self.is_dense:
            return rows
        return rows + self.mv(phi if theta is None else phi - theta)

    def solve(self, rows: Tensor) -> Tensor:
        """`Λ^-1 rows_i` for every row, [B, D]; 0 where Λ is not positive (definite)."""
        if not self.is_dense:
            return torch.where(self.values > 0, rows / self.values, 0.0)
        factor, info = torch.linalg.cholesky_ex(self.values)
        return torch.where(info == 0, torch.cholesky_solve(rows.T, factor).T, 0.0)

    def diagonal(self) -> Tensor:
        """[1] for a scalar, [D] otherwise."""
        return self.values.diagonal() if self.is_dense else self.values

    def norm(self) -> Tensor:
        """The norm of its entries: a 0-d float64 tensor."""
        if self.values.numel() == 1:
            return self.values.reshape(()).abs().double()
        norm: Tensor = torch.linalg.vector_norm(self.values, dtype=torch.float64)
        return norm

    def is_valid(self) -> Tensor:
        """Whether Λ is positive definite, or the scalar 0 (no proximal term): 0-d bool."""
        if self.values.numel() == 1:
            return ((self.values >= 0) & (self.values < torch.inf)).all()
        return self.is_positive_definite()

    def is_positive_definite(self) -> Tensor:
        """Whether Λ is finite, symmetric and positive definite: a 0-d bool tensor."""
        finite = self.values.isfinite().all()
        if not self.is_dense:
            return finite & (self.values > 0).all()
        matrix = self.values.detach()
        slack = 16 * torch.finfo(matrix.dtype).eps * matrix.abs().amax()
        symmetric = ((matrix - matrix.T).abs() <= slack).all()
        _, info = torch.linalg.cholesky_ex(torch.where(finite, matrix, 0.0))
        definite: Tensor = info == 0
        return finite & symmetric & definite

    def gradient(self, x: Tensor, displacement: Tensor) -> Tensor:
        """`-Σ_i x_i (phi_i - theta)'` in the form of `values`; x and displacement are [B, D]."""
        if self.is_dense:
            product = _matmul(x.T, displacement)
            return -0.5 * (product + product.T)
        return self.gradient_of_products((x * displacement).sum(0))

    def gradient_of_products(self, products: Tensor) -> Tensor:
        """The gradient for a scalar or diagonal Λ, from `Σ_i x_i * (phi_i - theta)`, [D]."""
        return -(products.sum().reshape(1) if self.values.numel() == 1 else products)


def flatten_lam(layout: Layout, lam: Any) -> Tensor:
    """The `values` of a `LamOperator`, from the form that users pass; differentiable.

    Values are checked on the CPU only, since on CUDA that would synchronise; invalid values on CUDA
    make the tasks NONFINITE.

    Raises:
        TypeError, ValueError: lam has an unknown form or shape, or is not positive (definite),
            symmetric and finite.
    """
    if isinstance(lam, Mapping):
        if lam.keys() != layout.shapes.keys():
            raise ValueError(f"lam must name {list(layout.shapes)}, got {list(lam)}")
        values = torch.cat([_flatten_one(layout, name, lam[name]) for name in layout.shapes])
    elif isinstance(lam, Tensor):
        if lam.shape not in ((), (layout.dim, layout.dim)):
            raise ValueError(
                f"a lam tensor must be 0-d, or dense [{layout.dim}, {layout.dim}], "
                f"got shape {list(lam.shape)}"
            )
        layout.check_like_parameters("lam", lam)
        values = lam.reshape(1) if lam.dim() == 0 else lam
    elif isinstance(lam, Real) and not isinstance(lam, bool):
        info, number = torch.finfo(layout.dtype), cast(Any, lam)
        if number != 0 and not info.smallest_normal * info.eps <= number <= info.max:
            raise ValueError(f"lam must be positive and finite, or 0, got {lam}, in {layout.dtype}")
        return torch.full((1,), float(lam), dtype=layout.dtype, device=layout.device)
    else:
        raise TypeError(
            f"lam must be a float, a tensor or a dict of tensors, got {type(lam).__name__}"
            + (": call it to get its value" if isinstance(lam, nn.Module) else "")
        )
    if may_read_values(values) and not bool(LamOperator(values).is_valid()):
        if values.dim() == 2:
            raise ValueError("a dense lam must be finite, symmetric and positive definite")
        raise ValueError("lam must be positive and finite in every entry, or a scalar 0")
    return values


def _flatten_one(layout: Layout, name: str, lam: Tensor) -> Tensor:
    shape = layout.shapes[name]
    layout.check_like_parameters(f"lam[{name!r}]", lam)
    if lam.dim() != 0 and lam.shape != shape:
        raise ValueError(
            f"lam[{name!r}] must be 0-d or of shape {list(shape)}, got {list(lam.shape)}"
        )
    return lam.expand(shape).reshape(-1)


def unflatten_lam_gradient(layout: Layout, lam: Lam, gradient: Tensor) -> Any:
    """The gradient of lam in the user's form, from that of its `values`; None for a float."""
    if isinstance(lam, Mapping):
        parts = layout.unflatten(gradient)
        return {name: parts[name].sum() if not t.dim() else parts[name] for name, t in lam.items()}
    return gradient.reshape(lam.shape) if isinstance(lam, Tensor) else None


def lam_of_rows(lam: float | Tensor, b: Tensor) -> LamOperator:
    """Λ of linear systems with right-hand sides b [B, D]; any finite values are accepted.

    Args:
        lam: a float, or a tensor [] or [1] (scalar), [D] (diagonal) or [D, D] (dense).
    """
    if not isinstance(lam, Tensor):
        if not abs(lam) <= torch.finfo(b.dtype).max:
            raise ValueError(f"lam must be finite, got {lam}, in {b.dtype}")
        return LamOperator(b.new_full((1,), lam))
    dim = b.shape[1]
    if lam.shape not in ((), (1,), (dim,), (dim, dim)):
        raise ValueError(f"lam must be a scalar, [{dim}] or [{dim}, {dim}], got {list(lam.shape)}")
    check_like("lam", lam, b, lam.shape)
    lam = lam.detach()
    return LamOperator(lam.contiguous() if lam.dim() else lam.reshape(1))


class ProximalStrength(nn.Module):
    """A learnable Λ that stays positive definite: `exp(log)`, or `L L' + floor I` if dense.

    The floor, 1e-3 of the initial value, keeps a dense Λ positive definite in float32; logarithms
    are clamped to ±60. Weight decay pulls Λ towards the identity, not towards 0.

    Calling it returns Λ in the autograd graph of its parameters, as for
    `adapt(..., lam=strength())`. `IMAML(..., lam=strength)` takes the module itself.

    Args:
        params: theta, {name: tensor}.
        initial: Λ is initially this multiple of the identity.
        form: one number ("scalar"), one per parameter tensor ("tensor"), one per scalar
            parameter ("diagonal"), or a matrix [D, D] ("dense", D(D+1)/2 numbers: for small D).

    Raises:
        TypeError, ValueError: `initial` is not positive and finite, or `form` is unknown.
    """

    def __init__(
        self, params: Mapping[str, Tensor], initial: float = 1.0, *, form: Form = "scalar"
    ) -> None:
        super().__init__()
        check_range("initial", initial, "(0, inf)")
        check_choice("form", form, ("scalar", "tensor", "diagonal", "dense"))
        layout = Layout(params)
        self.form = form
        self._names = list(layout.shapes)

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=layout.dtype, device=layout.device)

        log = math.log(initial)
        self.log: nn.Parameter | nn.ParameterList
        if form == "scalar":
            self.log = nn.Parameter(full(log))
        elif form == "tensor":
            self.log = nn.ParameterList([full(log) for _ in self._names])
        elif form == "diagonal":
            self.log = nn.ParameterList([full(log, *s) for s in layout.shapes.values()])
        else:  # L is the strictly lower part and exp of the diagonal
            self._floor = 1e-3 * initial
            self.log = nn.Parameter(torch.diag(full(0.5 * math.log(0.999 * initial), layout.dim)))

    def forward(self) -> Lam:
        """Λ in a form that `implicit_meta_grad` accepts."""
        if isinstance(self.log, nn.ParameterList):
            return {name: _exp(log) for name, log in zip(self._names, self.log, strict=True)}
        if self.form == "scalar":
            return _exp(self.log)
        factor = self.log.tril(-1) + torch.diag(_exp(self.log.diagonal()))
        floor = torch.full_like(self.log[0], self._floor)
        return _matmul(factor, factor.T) + torch.diag(floor)


def _exp(log: Tensor) -> Tensor:
    return log.clamp(-60, 60).exp()


def _matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix` in the dtype of the rows, even under autocast."""
    device = rows.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return rows @ matrix
    with torch.autocast(device, enabled=False):
        return rows @ matrix
