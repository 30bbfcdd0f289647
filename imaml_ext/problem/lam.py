"""A proximal strength that can be learned, positive by construction."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imaml_ext._checks import check_like
from imaml_ext._tracing import may_read_values
from imaml_ext.problem.layout import Layout

Lam = float | Tensor | Mapping[str, Tensor]


Form = Literal["scalar", "tensor", "diagonal", "dense"]


class ProximalStrength(nn.Module):
    """Λ as a function of parameters without bounds: `exp` of them, or `L L' + floor I` if dense.

    The floor, 1e-3 of the initial value, keeps a dense Λ definite in float32; logarithms count only
    within ±60. Weight decay pulls Λ to the identity, not to 0.

    Call it for Λ, in the graph of its parameters: `adapt(..., lam=strength())`, or hand it over as
    it is: `IMAML(..., lam=strength)`.

    Args:
        params: theta, {name: tensor}.
        initial: the value to begin with, times the identity.
        form: one number for all ("scalar"), for each parameter tensor ("tensor"), for each scalar
            ("diagonal"), or a matrix [D, D] ("dense": D(D+1)/2 numbers matter; for small D).

    Raises:
        ValueError: initial is not positive and finite, or there is no such form.
    """

    def __init__(
        self, params: Mapping[str, Tensor], initial: float = 1.0, *, form: Form = "scalar"
    ) -> None:
        super().__init__()
        if not (math.isfinite(initial) and initial > 0):
            raise ValueError(f"initial must be positive and finite, got {initial}")
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
        elif form == "dense":  # L is the strictly lower part and exp of the diagonal
            self._floor = 1e-3 * initial
            self.log = nn.Parameter(torch.diag(full(0.5 * math.log(0.999 * initial), layout.dim)))
        else:
            raise ValueError(
                f"form must be 'scalar', 'tensor', 'diagonal' or 'dense', got {form!r}"
            )

    def forward(self) -> Lam:
        """Λ as `implicit_meta_grad` takes it."""
        if isinstance(self.log, nn.ParameterList):
            return {name: _exp(log) for name, log in zip(self._names, self.log, strict=True)}
        if self.form == "scalar":
            return _exp(self.log)
        factor = self.log.tril(-1) + torch.diag(_exp(self.log.diagonal()))
        floor = torch.full_like(self.log[0], self._floor)
        return matrix_product(factor, factor.T) + torch.diag(floor)


def _exp(log: Tensor) -> Tensor:
    return log.clamp(-60, 60).exp()


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


def lam_leaves(layout: Layout, lam: Lam) -> tuple[Any, Tensor]:
    """Copies of lam's tensors that record gradients, and Λ as a function of them."""
    flatten_lam(layout, lam)  # its form, before anything is asked of its parts
    with torch.enable_grad():
        if isinstance(lam, Tensor):
            leaves: Any = lam.detach().requires_grad_()
        elif isinstance(lam, Mapping):
            leaves = {name: t.detach().requires_grad_() for name, t in lam.items()}
        else:
            return None, flatten_lam(layout, lam)
        return leaves, flatten_lam(layout, leaves)


def lam_gradient(leaves: Any, flat_lam: Tensor, gradient: Tensor) -> Any:
    if leaves is None:
        return None
    if isinstance(leaves, Tensor):
        return torch.autograd.grad(flat_lam, leaves, gradient)[0]
    parts = torch.autograd.grad(flat_lam, list(leaves.values()), gradient)
    return dict(zip(leaves, parts, strict=True))


def flatten_solver_lam(lam: float | Tensor, b: Tensor) -> Tensor:
    if not isinstance(lam, Tensor):
        if not abs(lam) <= torch.finfo(b.dtype).max:
            raise ValueError(f"lam must be finite, got {lam}, in {b.dtype}")
        return b.new_full((1,), lam)
    dim = b.shape[1]
    if lam.shape not in ((), (1,), (dim,), (dim, dim)):
        raise ValueError(f"lam must be a scalar, [{dim}] or [{dim}, {dim}], got {list(lam.shape)}")
    check_like("lam", lam, b, lam.shape)
    return lam.detach().contiguous() if lam.dim() else lam.detach().reshape(1)


def flatten_lam(layout: Layout, lam: Any) -> Tensor:
    """Λ without names: [1] for a scalar, [D] for a diagonal, [D, D] dense; differentiable.

    Values are checked here on the CPU. On CUDA that would synchronise: `implicit` marks the
    tasks instead.

    Raises:
        TypeError, ValueError: not of a form or shape that is known, not positive (definite),
            not symmetric, not finite.
    """
    if isinstance(lam, Mapping):
        if lam.keys() != layout.shapes.keys():
            raise ValueError(f"lam must name {list(layout.shapes)}, got {list(lam)}")
        flat = torch.cat([_diagonal_part(layout, name, lam[name]) for name in layout.shapes])
    elif isinstance(lam, Tensor):
        if lam.shape not in ((), (layout.dim, layout.dim)):
            raise ValueError(
                f"a lam tensor must be 0-d, or dense [{layout.dim}, {layout.dim}], "
                f"got shape {list(lam.shape)}"
            )
        layout.check_like_parameters("lam", lam)
        flat = lam.reshape(1) if lam.dim() == 0 else lam
    elif isinstance(lam, Real) and not isinstance(lam, bool):
        if not _is_positive_in(layout.dtype, lam):
            raise ValueError(f"lam must be positive and finite, got {lam}, in {layout.dtype}")
        return torch.full((1,), float(lam), dtype=layout.dtype, device=layout.device)
    else:
        raise TypeError(
            f"lam must be a float, a tensor or a dict of tensors, got {type(lam).__name__}"
        )
    if may_read_values(flat) and not bool(is_positive(flat)):
        if flat.dim() == 2:
            raise ValueError("a dense lam must be finite, symmetric and positive definite")
        raise ValueError("lam must be positive and finite in every entry")
    return flat


def _diagonal_part(layout: Layout, name: str, lam: Tensor) -> Tensor:
    shape = layout.shapes[name]
    layout.check_like_parameters(f"lam[{name!r}]", lam)
    if lam.dim() != 0 and lam.shape != shape:
        raise ValueError(
            f"lam[{name!r}] must be 0-d or of shape {list(shape)}, got {list(lam.shape)}"
        )
    return lam.expand(shape).reshape(-1)
