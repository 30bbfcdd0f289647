"""Conjugate gradient on a batch of independent linear systems."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from imaml_ext._checks import check_choice, check_integer, check_like
from imaml_ext._random import random_bits
from imaml_ext._tracing import is_tracing, may_read_values
from imaml_ext.ops.rows import cg_step_, is_not_finite, row_dot
from imaml_ext.problem.objective import Matvec
from imaml_ext.solvers.linear.base import (
    LinearSolver,
    LinearSystem,
    finished,
    initial_status,
    squared_tolerance,
    with_true_residual,
)
from imaml_ext.solvers.solution import Lanczos, Solution, Status, all_done


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradient, for positive definite systems; see `conjugate_gradient`.

    Args:
        max_iter, rtol, atol, damping, curvature: as in `LinearSolver`.
        preconditioner: diagonal, `|d| + Λ + damping` with an estimate d of H's diagonal.
            "jacobi": d is the mean of `z * Hz` over random signs z (Bekas, Kokiopoulou, Saad 2007).
            "adam": d is the root of the second moment of `inner=Adam(...)`, scaled to the curvature
            of H along v, which takes one more product.
        probes: number of random vectors for "jacobi", one product each.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.
    """

    preconditioner: Literal["jacobi", "adam"] | None = None
    probes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("preconditioner", self.preconditioner, ("jacobi", "adam", None))
        check_integer("probes", self.probes, minimum=1)
        if self.preconditioner != "jacobi" and self.probes != type(self).probes:
            raise ValueError(f"probes={self.probes} needs preconditioner='jacobi'")

    def _solve(self, system: LinearSystem) -> Solution:
        preconditioner = None
        if self.preconditioner == "jacobi":
            preconditioner = _preconditioner(system, _jacobi_diagonal(system, self.probes))
        elif self.preconditioner == "adam":
            preconditioner = _preconditioner(system, _adam_diagonal(system))
        return _iterate(system, self.max_iter, self.rtol, self.atol, preconditioner=preconditioner)


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

    Each row stops independently and is frozen once done. Besides the product with H, an iteration
    is one fused kernel. On CUDA up to 64 iterations do not synchronise; a longer solve synchronises
    every 64, to stop when all rows are done, but never while being recorded.

    Args:
        matvec: maps [B, D] to [B, D], row i by `H_i`; called at most `max_iter` times, once more
            for `x0`, and once more to check convergence.
        b: right-hand sides, [B, D], float32 or float64.
        lam: Λ: a float, or a tensor of shape [], [1] (scalar), [D] (diagonal) or [D, D] (dense);
            or one per row: [B, 1] (scalars) or [B, D] (diagonals). If B = D, [B, D] is dense, and
            [B, 1, D] has the diagonals.
        damping: added to the diagonal.
        max_iter: maximum number of iterations.
        rtol, atol: when a row stops, and what CONVERGED means, as in `LinearSolver`.
        x0: initial x, [B, D]; default 0.
        preconditioner: diagonal of M, positive, [D] or [B, D]. The less the eigenvalues of
            M^-1 (H + Λ) are spread, the fewer iterations. The stopping criterion is still `|r|`.

    Returns:
        `value` is x and `residual` is `|b - A x|`: the recurrence's `|r|`, or the true one where
        the two may differ by more than a factor of 2. A row with `b = 0` is CONVERGED in 0 steps. A
        row whose curvature `p·Ap` is not positive is NEGATIVE_CURVATURE and keeps the previous
        iterate; in the first iteration, its value is `x0 + Λ^-1 r`, the solution without H, where
        Λ > 0. A row whose A is singular in this precision gets the same value and status, with
        0 steps. A counts as singular if the residual plus `10 eps |A| |x|` exceeds `|b|`, and
        either `p·Ap <= 4 eps |A| |p|²` for some direction, or `20 eps |A| |x| > |b|`; |A| is
        estimated from the measured curvature. A row with a non-finite entry is NONFINITE and its
        value is 0. Norms are squared in float64 without scaling: float64 entries beyond 1e±150
        overflow or underflow.

    Raises:
        TypeError, ValueError: `b`, `lam`, `x0` or a setting is invalid, or `matvec` did not
            return [B, D] like `b`.

    Source: Hestenes, Stiefel 1952, "Methods of conjugate gradients for solving linear systems".
    """
    ConjugateGradient(max_iter, rtol, atol, damping)  # checks the settings
    system = LinearSystem(matvec, b, lam, damping)
    if x0 is not None:
        check_like("x0", x0, system.b)
    with torch.no_grad():
        return finished(system, _iterate(system, max_iter, rtol, atol, x0, preconditioner))


def _iterate(
    system: LinearSystem,
    max_iter: int,
    rtol: float,
    atol: float,
    x0: Tensor | None = None,
    preconditioner: Tensor | None = None,
) -> Solution:
    b = system.b
    if system.conjugate_gradient is not None and x0 is None and preconditioner is None:
        return _in_one_call(system, max_iter, rtol, atol)
    if x0 is None:
        x, r0 = torch.zeros_like(b), b
    else:
        x = x0.detach().clone(memory_format=torch.contiguous_format)
        r0 = b - system.product(x)
    r = r0.clone()
    inverse = None if preconditioner is None else _inverse(preconditioner, b)
    rr = row_dot(r, r)
    tol2 = squared_tolerance(b, rtol, atol, rr if x0 is None else None)
    status = initial_status(rr, tol2)
    if x0 is not None:
        x = x.masked_fill(is_not_finite(rr)[:, None], 0.0)
    start = _Start(r0, rr.sqrt(), None if x0 is None else x.clone())
    p = r.clone() if inverse is None else inverse * r
    rz = None if inverse is None else row_dot(r, p)
    steps = torch.zeros_like(status)
    curvature, beta = rr.new_zeros(2, max_iter, b.shape[0])
    state: Any = {
        "x": x, "r": r, "lam": system.lam.fused, "damping": system.damping, "rr": rr, "tol2": tol2,
        "status": status, "steps": steps, "inverse": inverse, "rz": rz,
    }  # fmt: skip
    for k in range(max_iter):
        if all_done(status, k):
            break
        hp = system.unfused_product(p)
        cg_step_(p=p, hp=hp, curvature=curvature[k], beta=beta[k], **state)
        del hp  # otherwise it would stay in memory while the next one is computed
    negative = status == Status.NEGATIVE_CURVATURE
    if not system.lam.is_fused:  # otherwise the kernel has done this
        at_once = negative & (steps == 0)
        x = torch.where(at_once[:, None], x + system.lam.solve(r), x)
    # Without parameters there is no largest entry, and nothing to scale.
    scale = None if inverse is None or not inverse.shape[1] else 1 / inverse.amax(1).double()
    lanczos = Lanczos.of_conjugate_gradient(curvature, beta, steps + negative, scale)
    solution = Solution(x, status, steps, rr.sqrt(), lanczos)
    return _checked(system, solution, start, (curvature, beta), inverse, rtol, atol)


def _in_one_call(system: LinearSystem, max_iter: int, rtol: float, atol: float) -> Solution:
    """As `_iterate`, by a program."""
    assert system.conjugate_gradient is not None
    found = system.conjugate_gradient(
        system.b, lam=system.lam.fused, damping=system.damping,
        max_iter=max_iter, rtol=rtol, atol=atol,
    )  # fmt: skip
    status, lanczos = found.status, Lanczos(found.diagonal, found.link, found.count)
    solution = Solution(found.x, status, found.steps, found.residual, lanczos)
    if found.is_plain:
        system.is_plain = True
        status.masked_fill_(status == Status.RUNNING, Status.MAX_ITER)
        return solution
    start = _Start(system.b, found.norm, None)
    return _checked(system, solution, start, (found.curvature, found.beta), None, rtol, atol)


class _Start(NamedTuple):
    """Where a solve started: r0, |r0|, and x0 unless that is 0."""

    r: Tensor
    residual: Tensor
    x: Tensor | None


def _checked(
    system: LinearSystem,
    solution: Solution,
    start: _Start,
    coefficients: tuple[Tensor, Tensor],
    inverse: Tensor | None,
    rtol: float,
    atol: float,
) -> Solution:
    """The solution, with true residuals where needed, and `x0 + Λ^-1 r0` where A is singular.

    Without curvature x grows without limit, and in the end the residual with it.
    """
    b, x, lanczos = system.b, solution.value, solution.lanczos
    assert lanczos is not None
    # |A|, within a factor of 3: for a positive definite tridiagonal matrix, the largest entry.
    rounding = torch.finfo(b.dtype).eps * lanczos.diagonal.amax(0)
    of_a = rounding if lanczos.scale is None or inverse is None else rounding / inverse.amin(1)
    error = of_a * row_dot(x, x).sqrt()  # of the residual of x
    size = norm = start.residual
    if start.x is not None:
        norm = row_dot(b, b).sqrt()
        size = torch.maximum(size, norm)
        error = torch.maximum(error, of_a * row_dot(start.x, start.x).sqrt())
    checked = with_true_residual(system, solution, norm, rtol, atol, 20 * error)
    residual = checked.residual if rtol > 0 or atol > 0 else solution.residual
    worse = (residual + 10 * error > size) & (solution.steps > 0)
    if may_read_values(b) and not bool(worse.any()):
        return checked
    # An ill-conditioned solve that will succeed may also be worse than x = 0 for a time, but hardly
    # with such an x, or after such a direction.
    flat = (_rayleigh(*coefficients).abs() <= 4 * rounding).any(0)
    lost = worse & (flat | (20 * error > size))
    x = system.lam.solve(start.r) if start.x is None else start.x + system.lam.solve(start.r)
    return replace(
        checked,
        value=torch.where(lost[:, None], x, checked.value),
        status=checked.status.masked_fill(lost, Status.NEGATIVE_CURVATURE),
        steps=checked.steps.masked_fill(lost, 0),
        residual=torch.where(lost, start.residual, checked.residual),
    )


def _rayleigh(curvature: Tensor, beta: Tensor) -> Tensor:
    """`p'Ap / p'Mp` of each iteration, [max_iter, B]; NaN for a frozen row.

    `curvature` is `p'Ap / r'z`, and `p'Mp = (r'z)² (1 / r'z + 1 / previous r'z + ...)`.
    """
    rz = torch.cat([torch.ones_like(beta[:1]), beta[:-1].cumprod(0)])  # relative to the first
    return curvature / (rz * (1 / rz).cumsum(0))


def _inverse(preconditioner: Tensor, b: Tensor) -> Tensor:
    check_like("preconditioner", preconditioner, b, b.shape, b.shape[1:])
    inverse = 1 / preconditioner.detach()
    if may_read_values(b) and not bool(((inverse > 0) & inverse.isfinite()).all()):
        raise ValueError("preconditioner and its inverse must be positive and finite")
    return inverse.expand_as(b).contiguous()


def _preconditioner(system: LinearSystem, diagonal: Tensor) -> Tensor:
    """`|d| + Λ + damping`, 1 where that cannot be a divisor, from H's diagonal d, [B, D]."""
    diagonal = diagonal.abs() + system.lam.diagonal() + system.damping
    tiny = torch.finfo(diagonal.dtype).tiny
    return torch.where((diagonal > tiny) & (diagonal < 1 / tiny), diagonal, 1.0)


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
