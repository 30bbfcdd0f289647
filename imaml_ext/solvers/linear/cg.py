"""Conjugate gradient on a batch of independent linear systems, each with its own stopping."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imaml_ext._checks import check_integer, check_like
from imaml_ext._random import random_bits
from imaml_ext._tracing import is_tracing, may_read_values
from imaml_ext.ops.rows import cg_step_, row_dot
from imaml_ext.problem.objective import Matvec
from imaml_ext.solvers.linear.base import (
    LinearSolver,
    System,
    check_settings,
    initial_status,
    squared_tolerance,
)
from imaml_ext.solvers.solution import Lanczos, Solution, Status, all_done


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradient, for systems that are positive definite; see `conjugate_gradient`.

    Args:
        max_iter, rtol, atol, damping, curvature: as in `LinearSolver`.
        preconditioner: a diagonal one, `|d| + Λ + damping` with d an estimate of H's diagonal:
            "jacobi": the mean of `z * Hz` over random signs z (Bekas, Kokiopoulou, Saad 2007);
            "adam": the root of the second moment that `inner=Adam(...)` kept, scaled to the
            curvature of H along v, for one more product.
        probes: random vectors of "jacobi", one product each.

    Raises:
        ValueError: a setting is out of range.
    """

    preconditioner: Literal["jacobi", "adam"] | None = None
    probes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner not in (None, "jacobi", "adam"):
            raise ValueError(
                f"preconditioner must be 'jacobi', 'adam' or None, got {self.preconditioner!r}"
            )
        check_integer("probes", self.probes)
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")

    def solve(
        self,
        matvec: Matvec,
        b: Tensor,
        lam: float | Tensor = 0.0,
        *,
        second_moment: Tensor | None = None,
    ) -> Solution:
        diagonal = None
        if self.preconditioner == "jacobi":
            if is_tracing():
                raise RuntimeError(
                    "preconditioner='jacobi' cannot be compiled: its random probes overflow there"
                )
            diagonal = _jacobi(matvec, b, self.probes)
        elif self.preconditioner == "adam":
            if second_moment is None:
                raise ValueError(
                    "preconditioner='adam' needs the second moment that an inner solver kept: "
                    "inner=Adam(...), and no adapted="
                )
            diagonal = _from_second_moment(matvec, b, second_moment)
        if diagonal is not None:
            strength = lam.diagonal() if isinstance(lam, Tensor) and lam.dim() == 2 else lam
            diagonal = diagonal.abs() + strength + self.damping
            # Where the estimate says nothing, M is 1: the solve itself tells what is not finite.
            tiny = torch.finfo(b.dtype).tiny
            usable = (diagonal > tiny) & (diagonal < 1 / tiny)
            diagonal = torch.where(usable, diagonal, 1.0)
        return conjugate_gradient(
            matvec,
            b,
            lam=lam,
            damping=self.damping,
            max_iter=self.max_iter,
            rtol=self.rtol,
            atol=self.atol,
            preconditioner=diagonal,
        )


def conjugate_gradient(
    matvec: Matvec,
    b: Tensor,
    *,
    lam: float | Tensor = 0.0,
    damping: float = 0.0,
    max_iter: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    x0: Tensor | None = None,
    preconditioner: Tensor | None = None,
) -> Solution:
    """Solve `(H_i + Λ + damping I) x_i = b_i` for every row i, H_i symmetric.

    Nothing is decided for the batch as a whole: a row freezes when it is done, whatever the others
    do. Besides the products, an iteration is one fused kernel. On CUDA nothing synchronises in up
    to 64 iterations, nor while they are recorded; a longer solve waits for the device every 64, to
    see if all rows are done.

    Args:
        matvec: maps [B, D] to [B, D], row i by `H_i`; called at most `max_iter` times, and once
            more for `x0`.
        b: right-hand sides, [B, D], float32 or float64.
        lam: Λ: a float, or a tensor of shape [], [1] (scalar), [D] (diagonal) or [D, D] (dense).
        damping: added to the diagonal.
        max_iter: iterations at most.
        rtol, atol: a row stops when `|r| <= max(atol, rtol |b|)`, or `|r| <= eps |b|`, below which
            the recurrence computes rounding errors.
        x0: where to start, [B, D]; default 0.
        preconditioner: the diagonal of M, positive, [D] or [B, D]: what M^-1 (H + Λ) has less
            spread eigenvalues of, the fewer iterations. Stopping is by `|r|` all the same.

    Returns:
        `value` is x and `residual` the recurrence's `|r|`. A row with `b = 0` is CONVERGED in 0
        steps. A row whose curvature `p·Ap` is not positive is NEGATIVE_CURVATURE and keeps the
        iterate before it; if that is its first, `x = x0 + Λ^-1 r`, the solution without H, wherever
        Λ > 0. A row with a non-finite entry is NONFINITE and its value is 0. Norms are squared in
        float64 without scaling: float64 entries beyond 1e±150 overflow or vanish.

    Raises:
        TypeError, ValueError: `b`, `lam`, `x0` or a setting does not fit, or `matvec` returned
            something that is not [B, D] like `b`.

    Source: Hestenes, Stiefel 1952, "Methods of conjugate gradients for solving linear systems".
    """
    check_settings(max_iter, rtol, atol, damping)
    system = System(matvec, b, lam, damping)
    b = system.b
    if x0 is None:
        x, r = torch.zeros_like(b), b.clone()
    else:
        check_like("x0", x0, b)
        x = x0.detach().clone(memory_format=torch.contiguous_format)
        r = b - system.product(x)
    with torch.no_grad():
        inverse = None if preconditioner is None else _inverse(preconditioner, b)
        rr = row_dot(r, r)
        tol2 = squared_tolerance(b, rtol, atol)
        status = initial_status(rr, tol2)
        x = torch.where(rr.isfinite()[:, None], x, 0.0)
        p = r.clone() if inverse is None else inverse * r
        rz = None if inverse is None else row_dot(r, p)
        steps = torch.zeros_like(status)
        curvature, beta = rr.new_zeros(2, max_iter, b.shape[0])
    for k in range(max_iter):
        if all_done(status, k):
            break
        hp = system.unfused(p)
        with torch.no_grad():
            cg_step_(
                x, r, p, hp, system.fused, damping=damping, rr=rr, tol2=tol2, status=status,
                steps=steps, curvature=curvature[k], beta=beta[k], inverse=inverse, rz=rz,
            )  # fmt: skip
        del hp  # or it would lie beside the next one
    with torch.no_grad():
        negative = status == Status.NEGATIVE_CURVATURE
        if system.is_dense:  # for a diagonal Λ the kernel has done it
            at_once = negative & (steps == 0)
            x = torch.where(at_once[:, None], x + system.without_h(r), x)
        status = torch.where(status == Status.RUNNING, Status.MAX_ITER, status).to(torch.int32)
        residual = torch.where(status == Status.NONFINITE, torch.nan, rr).sqrt()
        # Without parameters there is no largest entry, and nothing that it would scale.
        scale = None if inverse is None or not inverse.shape[1] else 1 / inverse.amax(1).double()
        lanczos = Lanczos.of_conjugate_gradient(curvature, beta, steps + negative, scale)
    return Solution(x, status, steps, residual, lanczos)


def _inverse(preconditioner: Tensor, b: Tensor) -> Tensor:
    check_like("preconditioner", preconditioner, b, b.shape, b.shape[1:])
    inverse = 1 / preconditioner.detach()
    if may_read_values(b) and not bool(((inverse > 0) & inverse.isfinite()).all()):
        raise ValueError("preconditioner must be positive in every entry, and so its inverse")
    return inverse.expand_as(b).contiguous()


@torch.no_grad()
def _jacobi(matvec: Matvec, b: Tensor, probes: int) -> Tensor:
    """The diagonal of each `H_i`, estimated, [B, D]; the same alone as in a batch."""
    total = torch.zeros_like(b)
    for probe in range(probes):
        signs = 2 * (random_bits(0, probe, 0, range(1), b.shape[1:], b.device) % 2) - 1
        z = signs.to(b.dtype).expand_as(b).contiguous()
        total += z * matvec(z).detach()
    return total / probes


@torch.no_grad()
def _from_second_moment(matvec: Matvec, b: Tensor, second_moment: Tensor) -> Tensor:
    """`c sqrt(second moment)` with c such that it has H's curvature along b, [B, D]."""
    root = second_moment.sqrt()
    along_h, along_root = row_dot(b, matvec(b).detach().contiguous()), row_dot(b, root * b)
    c = torch.where(along_root > 0, along_h.abs() / along_root, 0.0)
    return c[:, None].to(b.dtype) * root
