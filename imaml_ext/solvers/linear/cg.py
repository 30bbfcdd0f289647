"""Conjugate gradient on a batch of independent linear systems."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from imaml_ext._checks import check_integer
from imaml_ext._tracing import may_read_values
from imaml_ext.ops.rows import cg_step_, row_dot
from imaml_ext.problem.objective import Matvec
from imaml_ext.solvers.linear.base import (
    LinearSolver,
    LinearSystem,
    finished,
    initial_status,
    squared_tolerance,
    with_true_residual,
)
from imaml_ext.solvers.linear.preconditioner import (
    Preconditioner,
    check_preconditioner,
    inverse_of,
)
from imaml_ext.solvers.solution import Lanczos, Solution, Status, all_done


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradient, for positive definite systems; see `conjugate_gradient`.

    Args:
        max_iter, rtol, atol, damping, curvature: as in `LinearSolver`.
        preconditioner: as in `conjugate_gradient`, or an estimate d of H's diagonal, which gives
            the diagonal `M = |d| + Λ + damping`. "jacobi": d is the mean of `z * Hz` over random
            signs z (Bekas, Kokiopoulou, Saad 2007). "adam": d is the root of the second moment of
            `inner=Adam(...)`, scaled to the curvature of H along v, which takes one more product.
        probes: number of random vectors for "jacobi", one product each.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.
    """

    _completes_status = True

    preconditioner: Literal["jacobi", "adam"] | Tensor | Preconditioner | None = None
    probes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self.preconditioner)
        check_integer("probes", self.probes, minimum=1)
        is_jacobi = isinstance(self.preconditioner, str) and self.preconditioner == "jacobi"
        if not is_jacobi and self.probes != type(self).probes:
            raise ValueError(f"probes={self.probes} needs preconditioner='jacobi'")

    def _solve(self, system: LinearSystem) -> Solution:
        inverse = inverse_of(self.preconditioner, system, self.probes)
        return _solve(system, self.max_iter, self.rtol, self.atol, inverse)


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
    preconditioner: Tensor | Preconditioner | None = None,
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
        preconditioner: M, or a function that applies M^-1. A tensor: the diagonal of M, positive,
            [D] or [B, D]; or a symmetric positive definite matrix, [D, D], [1, D, D] or [B, D, D].
            If B = D, a [D, D] tensor is refused as ambiguous. A function maps r [B, D] to
            `M_i^-1 r_i`, for a symmetric positive definite M_i. Iterations with a matrix or a
            function are not fused. The closer together the eigenvalues of M^-1 (H + Λ), the fewer
            iterations. The stopping criterion is still `|r|`.

    Returns:
        `value` is x, and `residual` is the recurrence's `|r|`, or `|b - A x|` where the two may
        differ by more than a factor of 2. A row with `b = 0` is CONVERGED in 0 steps. A row whose
        curvature `p·Ap` is not positive is NEGATIVE_CURVATURE and keeps the previous iterate; in
        the first iteration, its value is `x0 + Λ^-1 r`, the solution without H, where Λ > 0. A row
        whose A is singular in this precision gets the same value and status, with 0 steps. A counts
        as singular if the residual plus `10 eps |A| |x|` exceeds `|b|`, and either
        `p·Ap <= 4 eps |A| |p|²` for some direction, or `20 eps |A| |x| > |b|`; |A| is estimated
        from the measured curvature. A row with a non-finite entry is NONFINITE and its value is 0.
        Norms are squared in float64 without scaling, so float64 entries beyond 1e±150 overflow or
        underflow.

    Raises:
        TypeError, ValueError: `b`, `lam`, `x0`, `preconditioner` or a setting is invalid, or
            `matvec` did not return [B, D] like `b`.

    Source: Hestenes, Stiefel 1952, "Methods of conjugate gradients for solving linear systems".
    """
    ConjugateGradient(max_iter, rtol, atol, damping)  # checks the settings
    check_preconditioner(preconditioner, named=False)
    system = LinearSystem(matvec, b, lam, damping)
    with torch.no_grad():
        if x0 is not None:
            system.start_at(x0)
        inverse = inverse_of(preconditioner, system)
        return finished(system, _solve(system, max_iter, rtol, atol, inverse))


def _solve(
    system: LinearSystem,
    max_iter: int,
    rtol: float,
    atol: float,
    inverse: Tensor | Preconditioner | None,
) -> Solution:
    if inverse is None:
        if system.conjugate_gradient is not None and system.x0 is None:
            return _in_one_call(system, max_iter, rtol, atol)
        return _iterate(system, max_iter, rtol, atol, None)
    if isinstance(inverse, Tensor):
        return _iterate(system, max_iter, rtol, atol, inverse)
    return _iterate_unfused(system, max_iter, rtol, atol, inverse)


def _iterate(
    system: LinearSystem, max_iter: int, rtol: float, atol: float, inverse: Tensor | None
) -> Solution:
    """Fused iterations; `inverse` is the diagonal of M^-1, [B, D], or None."""
    b = system.b
    x, r = torch.zeros_like(b), b.clone()
    rr = row_dot(r, r)
    norm = rr.sqrt()
    tol2 = squared_tolerance(system, rr, rtol, atol)
    status = initial_status(rr, tol2)
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
    # |A|, within a factor of 3: for a positive definite tridiagonal matrix, the largest entry.
    largest = lanczos.diagonal.amax(0)
    of_a = largest if scale is None or inverse is None else largest / inverse.amin(1)
    return _checked(
        system, solution, norm, of_a, lambda: _smallest(curvature, beta) / largest, rtol, atol
    )


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
        system.is_final = True
        status.masked_fill_(status == Status.RUNNING, Status.MAX_ITER)
        return solution
    largest = lanczos.diagonal.amax(0)
    return _checked(
        system, solution, found.norm, largest,
        lambda: _smallest(found.curvature, found.beta) / largest, rtol, atol,
    )  # fmt: skip


def _iterate_unfused(
    system: LinearSystem, max_iter: int, rtol: float, atol: float, apply: Preconditioner
) -> Solution:
    """Iterations with any M^-1, with the decisions of `cg_step_`.

    The curvature reported is the smallest and the largest `p'Ap / p'p`.
    """
    b = system.b
    eps = torch.finfo(b.dtype).eps
    x, r = torch.zeros_like(b), b.clone()
    rr = row_dot(r, r)
    norm = rr.sqrt()
    tol2 = squared_tolerance(system, rr, rtol, atol)
    status = initial_status(rr, tol2)
    steps = torch.zeros_like(status)
    p = apply(r)
    rz = row_dot(r, p)
    least, most = torch.full_like(rr, torch.inf), torch.full_like(rr, -torch.inf)
    for k in range(max_iter):
        if all_done(status, k):
            break
        ap = system.product(p)
        pp, pap, apap = row_dot(p, p), row_dot(p, ap), row_dot(ap, ap)
        running, alpha = status == Status.RUNNING, rz / pap
        measured = running & apap.isfinite() & (rz > 0)
        least = torch.where(measured, torch.minimum(least, pap / pp), least)
        most = torch.where(measured, torch.maximum(most, pap / pp), most)
        negative = measured & (pap <= eps * (pp * apap).sqrt())
        moves = measured & ~negative & alpha.isfinite()
        x = torch.where(moves[:, None], x + _column(alpha, b) * p, x)
        r = torch.where(moves[:, None], r - _column(alpha, b) * ap, r)
        z = apply(r)
        rr, rz_old, rz = torch.where(moves, row_dot(r, r), rr), rz, row_dot(r, z)
        p = torch.where(moves[:, None], z + _column(rz / rz_old, b) * p, p)
        steps += moves
        converged = moves & (rr <= tol2)
        status = status.masked_fill(negative, Status.NEGATIVE_CURVATURE)
        failed = running & ~negative & ~(moves & rr.isfinite() & ((rz > 0) | converged))
        status = status.masked_fill(failed, Status.NONFINITE)
        status = status.masked_fill(converged & ~failed, Status.CONVERGED)
    at_once = (status == Status.NEGATIVE_CURVATURE) & (steps == 0)
    x = torch.where(at_once[:, None], system.lam.solve(r), x)
    count = 2 * least.isfinite().to(torch.int32)
    lanczos = Lanczos(torch.stack([least, most]), least.new_zeros(1, len(least)), count)
    solution = Solution(x, status, steps, rr.sqrt(), lanczos)
    largest = most.clamp_min(0)
    return _checked(system, solution, norm, largest, lambda: least / largest, rtol, atol)


def _checked(
    system: LinearSystem,
    solution: Solution,
    norm: Tensor,
    largest: Tensor,
    smallest: Callable[[], Tensor],
    rtol: float,
    atol: float,
) -> Solution:
    """The solution, with true residuals where needed, and `Λ^-1 b` where A is singular.

    Without curvature x grows without limit, and in the end the residual with it.

    Args:
        norm: `|b|` of the system's b, [B] float64.
        largest: an estimate of |A|, [B] float64.
        smallest: the smallest measured `p'Ap / p'Mp`, relative to the largest, [B] float64.
    """
    b, x, eps = system.b, solution.value, torch.finfo(system.b.dtype).eps
    error = eps * largest * row_dot(x, x).sqrt()  # of the residual of x
    size = norm
    if system.x0 is not None and system.norm is not None:
        size = torch.maximum(norm, system.norm)
        error = torch.maximum(error, eps * largest * row_dot(system.x0, system.x0).sqrt())
    checked = with_true_residual(system, solution, norm, rtol, atol, 20 * error)
    residual = checked.residual if rtol > 0 or atol > 0 else solution.residual
    worse = (residual + 10 * error > size) & (solution.steps > 0)
    if may_read_values(b) and not bool(worse.any()):
        return checked
    # An ill-conditioned solve that will succeed may also be worse than x = 0 for a time, but hardly
    # with such an x, or after such a direction.
    lost = worse & ((smallest().abs() <= 4 * eps) | (20 * error > size))
    return replace(
        checked,
        value=torch.where(lost[:, None], system.lam.solve(b), checked.value),
        status=checked.status.masked_fill(lost, Status.NEGATIVE_CURVATURE),
        steps=checked.steps.masked_fill(lost, 0),
        residual=torch.where(lost, norm, checked.residual),
    )


def _smallest(curvature: Tensor, beta: Tensor) -> Tensor:
    """The smallest `|p'Ap / p'Mp|` of each row, [B], from coefficients [max_iter, B].

    `curvature` is `p'Ap / r'z`, and `p'Mp = (r'z)² (1 / r'z + 1 / previous r'z + ...)`; those of a
    frozen row are NaN.
    """
    rz = torch.cat([torch.ones_like(beta[:1]), beta[:-1].cumprod(0)])  # relative to the first
    return (curvature / (rz * (1 / rz).cumsum(0))).abs().nan_to_num(nan=torch.inf).amin(0)


def _column(factor: Tensor, rows: Tensor) -> Tensor:
    return factor[:, None].to(rows.dtype)
