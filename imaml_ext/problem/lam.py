"""Λ, the proximal strength: the forms that users pass, and a module that learns it."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from imaml_ext._checks import check_choice, check_like, check_range
from imaml_ext._tracing import may_read_values
from imaml_ext.problem.lam_operator import LamOperator, matmul
from imaml_ext.problem.layout import Layout

Lam = float | Tensor | Mapping[str, Tensor]

Form = Literal["scalar", "tensor", "diagonal", "dense"]


def flatten_lam(layout: Layout, lam: Any) -> Tensor:
    """The `values` of a `LamOperator`, from the form that users pass; differentiable.

    Values are checked on the CPU only, since on CUDA that would synchronise; invalid values on CUDA
    make the tasks NONFINITE. Whether a lam per task has the batch's number of tasks is checked by
    `Proximal`.

    Raises:
        TypeError, ValueError: lam has an unknown form or shape, or is not positive (definite),
            symmetric and finite.
    """
    if isinstance(lam, Mapping):
        values = _flatten_dict(layout, lam)
    elif isinstance(lam, Tensor):
        values = _flatten_tensor(layout, lam)
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
    if may_read_values(values) and not bool(LamOperator.of(values).is_valid().all()):
        if values.dim() == 2:
            raise ValueError(
                "a dense lam must be finite, symmetric and positive definite; for a diagonal per "
                "task, pass a dict of tensors [B, *shape]"
            )
        raise ValueError(
            "lam must be positive and finite in every entry, or a scalar 0: to exempt some "
            "parameters, pass 0 and add a penalty on the others to the loss"
        )
    return values


def _flatten_tensor(layout: Layout, lam: Tensor) -> Tensor:
    dim = layout.dim
    if lam.dim() > 2 or (lam.dim() == 2 and lam.shape[1] != dim):
        raise ValueError(
            f"a lam tensor must be 0-d, dense [{dim}, {dim}], or [B] or [B, {dim}] for B tasks, "
            f"got shape {list(lam.shape)}"
        )
    layout.check_like_parameters("lam", lam)
    if lam.shape == (dim, dim):
        return lam
    return lam.reshape(-1, 1, 1 if lam.dim() == 1 else dim) if lam.dim() else lam.reshape(1)


def _flatten_dict(layout: Layout, lam: Mapping[str, Tensor]) -> Tensor:
    if lam.keys() != layout.shapes.keys():
        raise ValueError(f"lam must name {list(layout.shapes)}, got {list(lam)}")
    tasks: dict[str, int] = {}  # of those that have a value per task
    for name, shape in layout.shapes.items():
        tensor = lam[name]
        layout.check_like_parameters(f"lam[{name!r}]", tensor)
        if tensor.dim() == len(shape) + 1 and _expands(tensor.shape[1:], shape):
            tasks[name] = len(tensor)
        elif tensor.dim() != 0 and not _expands(tensor.shape, shape):
            one = ", ".join(["B", *["1"] * len(shape)])
            raise ValueError(
                f"lam[{name!r}] must be 0-d or of shape {list(shape)}, or that with a first "
                f"dimension of B tasks, got {list(tensor.shape)}: one number per task has the "
                f"shape [{one}]"
            )
    if len(set(tasks.values())) > 1:
        raise ValueError(f"the tensors of lam must have the same number of tasks, got {tasks}")
    batch = (*set(tasks.values()), 1) if tasks else ()
    parts = [
        lam[name].expand((*batch[:1], *shape)).reshape((*batch, size))
        for (name, shape), size in zip(layout.shapes.items(), layout.sizes, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    """Whether `expand` makes the target from it, with the same number of dimensions."""
    return len(shape) == len(target) and all(
        size in (1, wanted) for size, wanted in zip(shape, target, strict=True)
    )


def unflatten_lam_gradient(layout: Layout, lam: Lam, gradient: Tensor) -> Any:
    """The gradient of lam in the user's form, from that of its `values`; None for a float."""
    if isinstance(lam, Mapping):
        parts = layout.unflatten(gradient.reshape(-1, layout.dim))  # [1 or B, *shape]
        return {name: parts[name].sum_to_size(t.shape) for name, t in lam.items()}
    return gradient.reshape(lam.shape) if isinstance(lam, Tensor) else None


def lam_of_rows(lam: float | Tensor, b: Tensor) -> LamOperator:
    """Λ of linear systems with right-hand sides b [B, D]; any finite values are accepted.

    Args:
        lam: a float, or a tensor: [] or [1] (scalar), [D] (diagonal), [D, D] (dense), [B, 1] or
            [B, D] (a scalar or a diagonal per row). If B = D, [B, D] is dense, and [B, 1, D] is a
            diagonal per row.
    """
    if not isinstance(lam, Tensor):
        if not abs(lam) <= torch.finfo(b.dtype).max:
            raise ValueError(f"lam must be finite, got {lam}, in {b.dtype}")
        return LamOperator.of(b.new_full((1,), lam))
    rows, dim = b.shape
    shared, per_row = ((), (1,), (dim,), (dim, dim)), ((rows, 1), (rows, dim))
    if lam.shape not in (*shared, *per_row, (rows, 1, 1), (rows, 1, dim)):
        raise ValueError(
            f"lam must be a scalar, [{dim}], [{dim}, {dim}], [{rows}, 1] or [{rows}, {dim}], got "
            f"{list(lam.shape)}"
        )
    check_like("lam", lam, b, lam.shape)
    lam = lam.detach()
    if lam.shape in per_row and lam.shape != (dim, dim):
        lam = lam[:, None]
    elif lam.shape == (rows, dim) and may_read_values(lam) and not _is_symmetric(lam):
        raise ValueError(
            f"a lam of shape {list(lam.shape)} is a dense matrix, and must be symmetric: for a "
            f"diagonal per row, pass it as {[rows, 1, dim]}"
        )
    return LamOperator.of(lam.contiguous() if lam.dim() else lam.reshape(1))


def _is_symmetric(matrix: Tensor) -> bool:
    if matrix.numel() == 0:
        return True
    slack = 1e-3 * matrix.abs().amax()  # far above rounding errors
    return not bool(((matrix - matrix.T).abs() > slack).any())


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
        return matmul(factor, factor.T) + torch.diag(floor)


def _exp(log: Tensor) -> Tensor:
    return log.clamp(-60, 60).exp()
