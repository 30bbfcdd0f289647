"""Preconditioners of conjugate gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext._checks import check_callable, check_choice, check_like
from imaml_ext._random import random_bits
from imaml_ext._tracing import is_tracing, may_read_values
from imaml_ext.ops.rows import row_dot
from imaml_ext.solvers.linear.base import LinearSystem

Preconditioner = Callable[[Tensor], Tensor]  # r [B, D] -> M^-1 r [B, D]


def check_preconditioner(value: Any, *, named: bool = True) -> None:
    """Raises TypeError or ValueError unless it is a tensor, a function, None, or one of the names.

    Args:
        named: whether the names "jacobi" and "adam" are accepted.
    """
    if value is None or isinstance(value, Tensor):
        return
    if isinstance(value, str) and named:
        check_choice("preconditioner", value, ("jacobi", "adam", None))
        return
    remedy = "or pass a tensor" + (", 'jacobi' or 'adam'" if named else "")
    check_callable("preconditioner", value, "(r)", remedy)


def inverse_of(
    preconditioner: str | Tensor | Preconditioner | None, system: LinearSystem, probes: int = 0
) -> Tensor | Preconditioner | None:
    """The diagonal of M^-1, [B, D], for a diagonal M; otherwise a function that applies M^-1.

    Args:
        probes: of "jacobi".

    Raises:
        ValueError: a tensor has another shape, or is not positive (definite).
    """
    if isinstance(preconditioner, str):
        return 1 / _diagonal(system, preconditioner, probes)
    if not isinstance(preconditioner, Tensor):
        return None if preconditioner is None else _checking(preconditioner)
    b = system.b
    tasks, dim = b.shape
    shapes = [b.shape, (dim,), (dim, dim), (1, dim, dim), (tasks, dim, dim)]
    check_like("preconditioner", preconditioner, b, *shapes)
    if tasks == dim > 1 and preconditioner.dim() == 2:
        raise ValueError(
            f"preconditioner {list(b.shape)} may be a matrix or one diagonal per row, as B = D: "
            "pass [1, D, D] for a matrix, or a function such as lambda r: r / diagonal"
        )
    m = preconditioner.detach()
    if m.dim() == 3 or (m.dim() == 2 and m.shape != b.shape):
        return _of_matrix(m)
    inverse = 1 / m
    if may_read_values(b) and not bool(((inverse > 0) & inverse.isfinite()).all()):
        raise ValueError("preconditioner and its inverse must be positive and finite")
    return inverse.expand_as(b).contiguous()


def _diagonal(system: LinearSystem, name: str, probes: int) -> Tensor:
    """`|d| + Λ + damping`, [B, D], where d estimates the diagonal of H as the name says.

    Entries that cannot be divisors are 1.
    """
    d = _jacobi_diagonal(system, probes) if name == "jacobi" else _adam_diagonal(system)
    diagonal = d.abs() + system.lam.diagonal() + system.damping
    tiny = torch.finfo(diagonal.dtype).tiny
    return torch.where((diagonal > tiny) & (diagonal < 1 / tiny), diagonal, 1.0)


def _of_matrix(m: Tensor) -> Preconditioner:
    if m.numel() == 0:
        return torch.clone
    finite = m.isfinite().all()
    factor, info = torch.linalg.cholesky_ex(torch.where(finite, m, 0.0))
    if may_read_values(m):
        slack = 16 * torch.finfo(m.dtype).eps * m.abs().amax()
        if not bool(finite & (info == 0).all() & ((m - m.mT).abs() <= slack).all()):
            raise ValueError("a matrix preconditioner must be symmetric positive definite")
    # On an accelerator, invalid values make the rows NONFINITE.
    factor = torch.where((info == 0)[..., None, None] & finite, factor, torch.nan)

    def apply(r: Tensor) -> Tensor:
        if factor.dim() == 2:
            return torch.cholesky_solve(r.mT, factor).mT
        return torch.cholesky_solve(r[..., None], factor)[..., 0]

    return apply


def _checking(function: Preconditioner) -> Preconditioner:
    def apply(r: Tensor) -> Tensor:
        z = function(r)
        if not isinstance(z, Tensor):
            raise TypeError(f"preconditioner must return a tensor, got {type(z).__name__}")
        check_like("the result of preconditioner", z, r)
        return z.detach()

    return apply


def _jacobi_diagonal(system: LinearSystem, probes: int) -> Tensor:
    """An estimate of the diagonal of each `H_i`, [B, D]; a row does not depend on the others."""
    if is_tracing():
        raise RuntimeError(
            "preconditioner='jacobi' cannot be compiled: its random probes would overflow int64"
        )
    b = system.b
    total = torch.zeros_like(b)
    for probe in range(probes):
        signs = 2 * (random_bits(0, probe, 0, range(1), b.shape[1:], b.device) % 2) - 1
        z = signs.to(b.dtype).expand_as(b).contiguous()
        total += z * system.curvature_product(z)
    return total / probes


def _adam_diagonal(system: LinearSystem) -> Tensor:
    """`c sqrt(second moment)`, with c such that its curvature along b is that of H, [B, D]."""
    if system.second_moment is None:
        raise ValueError(
            "preconditioner='adam' needs the second moment of the inner solver: "
            "use inner=Adam(...), without adapted="
        )
    b, root = system.b, system.second_moment.sqrt()
    along_h, along_root = row_dot(b, system.curvature_product(b)), row_dot(b, root * b)
    c = torch.where(along_root > 0, along_h.abs() / along_root, 0.0)
    return c[:, None].to(b.dtype) * root
