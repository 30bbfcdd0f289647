"""MINRES on a batch of independent symmetric linear systems, which may be indefinite."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.ops.rows import row_dot
from imaml_ext.solvers.linear.base import (
    LinearSolver,
    LinearSystem,
    initial_status,
    squared_tolerance,
    with_true_residual,
)
from imaml_ext.solvers.solution import Lanczos, Solution, Status, all_done


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """Minimal residual method: minimises `|b - A x|` over the Krylov space; A may be indefinite.

    For `H + Λ` with negative eigenvalues, where conjugate gradient stops. The meta-gradient is then
    the derivative of a stationary point that is not a minimum. An iteration costs one product and
    about twice the vector work of conjugate gradient, not fused.

    A row ends as MAX_ITER where the residual can be reduced no further: at the least-squares
    solution of a singular system, `|A r| <= eps^(3/4) |A| |r|`, or where rounding errors prevent
    further progress on an ill-conditioned system, in float32 from a condition number of about 1e4.
    x is then the previous iterate. CONVERGED is checked as described in `LinearSolver`.

    Args:
        max_iter, rtol, atol, damping, curvature: as in `LinearSolver`.

    Raises:
        TypeError, ValueError: as in `LinearSolver`.

    Source: Paige, Saunders 1975, "Solution of sparse indefinite systems of linear equations".
    """

    _completes_status = True

    def _solve(self, system: LinearSystem) -> Solution:
        b = system.b
        bb = row_dot(b, b)
        norm, tol2 = bb.sqrt(), squared_tolerance(system, bb, self.rtol, self.atol)
        status = initial_status(bb, tol2)
        steps, count = torch.zeros_like(status), torch.zeros_like(status)
        diagonal, link = norm.new_zeros(2, self.max_iter, len(b))

        x, w, w_old, v_old = torch.zeros(4, *b.shape, dtype=b.dtype, device=b.device)
        v = _scaled(b, 1 / norm)
        beta = torch.zeros_like(norm)  # of the Lanczos recurrence
        eta = norm.clone()  # the residual norm, with a sign
        size = torch.zeros_like(norm)  # lower estimate of |A|
        cos = cos_old = torch.ones_like(norm)
        sin = sin_old = torch.zeros_like(norm)
        kappa = torch.ones_like(norm)  # estimate of |A| |A^-1|
        eps = torch.finfo(b.dtype).eps
        for k in range(self.max_iter):
            if all_done(status, k):
                break
            # Lanczos: A v = beta v_old + alpha v + beta_new v_new
            product = system.product(v)
            alpha = row_dot(v, product)
            rest = product - _scaled(v, alpha) - _scaled(v_old, beta)
            beta_new = row_dot(rest, rest).sqrt()
            # Givens rotations make the tridiagonal matrix triangular.
            delta = cos * alpha - cos_old * sin * beta
            rho = torch.hypot(delta, beta_new)
            second, third = sin * alpha + cos_old * cos * beta, sin_old * beta
            running, finite = status == Status.RUNNING, rho.isfinite() & eta.isfinite()
            seen = running & finite  # the product that finds A singular counts too
            row = torch.hypot(torch.hypot(alpha, beta), beta_new)
            size = torch.where(seen, torch.maximum(size, row), size)
            cos_new, sin_new = delta / rho, beta_new / rho
            w_new = _scaled(v - _scaled(w_old, third) - _scaled(w, second), 1 / rho)
            x_new = x + _scaled(w_new, cos_new * eta)
            # The least-squares solution: |A r| = |r| |(delta, cos beta_new)|.
            stalls = torch.hypot(delta, cos * beta_new) <= eps**0.75 * size
            # Or x grows so large that the true residual cannot follow: its error, here its
            # size in random systems, is between eps |A| |x| and that times the condition number.
            kappa_new = torch.maximum(kappa, size * row_dot(w_new, w_new).sqrt())
            error = 0.1 * eps * kappa_new.sqrt() * size * row_dot(x_new, x_new).sqrt()
            stalls |= error > torch.maximum(eta.abs(), eps**0.5 * norm)
            moves = seen & ~stalls
            status = status.masked_fill(running & ~finite, Status.NONFINITE)
            status = status.masked_fill(seen & stalls, Status.MAX_ITER)
            diagonal[k], link[k] = torch.where(seen, alpha, 0), torch.where(seen, beta_new, 0)
            count += seen
            cos_new, sin_new = torch.where(moves, cos_new, 0), torch.where(moves, sin_new, 0)
            x = torch.where(moves[:, None], x_new, x)
            eta = torch.where(moves, -sin_new * eta, eta)
            kappa = torch.where(moves, kappa_new, kappa)
            steps += moves
            converged = moves & (eta * eta <= tol2)
            status = status.masked_fill(converged, Status.CONVERGED)
            # With beta_new = 0 the Krylov space is exhausted, and sin_new = 0 made eta 0.
            v_old, v, beta = v, _scaled(rest, 1 / beta_new), beta_new
            w_old, w = w, w_new
            cos_old, cos, sin_old, sin = cos, cos_new, sin, sin_new
        lanczos = Lanczos(diagonal, link[:-1], count)
        solution = Solution(x, status, steps, eta.abs(), lanczos)
        drift = 20 * eps * kappa * size * row_dot(x, x).sqrt()
        if system.x0 is not None:  # rounding in b - A x0
            drift = drift + 20 * eps * size * row_dot(system.x0, system.x0).sqrt()
        return with_true_residual(system, solution, norm, self.rtol, self.atol, drift)


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Row i times factor i; 0 where the factor is not finite, as in a row that is done."""
    return rows * factor.nan_to_num(0.0, 0.0, 0.0)[:, None].to(rows.dtype)
