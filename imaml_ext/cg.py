"""Conjugate gradient on a batch of independent linear systems, each with its own stopping."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.ops import cg_step_, row_dot
from imaml_ext.solution import CurvatureKind, Lanczos, Matvec, Solution, Status


@dataclass(frozen=True)
class ConjugateGradient:
    """Settings of the linear solve `(H + Λ + damping I) x = v` of a meta-gradient.

    Args:
        max_iter: products with H at most.
        rtol, atol: a task stops when `|r| <= max(atol, rtol |v|)`.
        damping: added to the diagonal.
        curvature: what H is: "hessian", the Hessian of the support loss, or "ggn", its generalised
            Gauss-Newton matrix, positive semi-definite for the usual losses, for which the loss
            must come from `module_loss`.
    """

    max_iter: int = 5
    rtol: float = 0.0
    atol: float = 0.0
    damping: float = 0.0
    curvature: CurvatureKind = "hessian"

    def __post_init__(self) -> None:
        _check_settings(self.max_iter, self.rtol, self.atol, self.damping)
        if self.curvature not in ("hessian", "ggn"):
            raise ValueError(f"curvature must be 'hessian' or 'ggn', got {self.curvature!r}")

    def solve(self, matvec: Matvec, b: Tensor, lam: float | Tensor = 0.0) -> Solution:
        return conjugate_gradient(
            matvec,
            b,
            lam=lam,
            damping=self.damping,
            max_iter=self.max_iter,
            rtol=self.rtol,
            atol=self.atol,
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
) -> Solution:
    """Solve `(H_i + Λ + damping I) x_i = b_i` for every row i, H_i symmetric.

    Nothing is decided for the batch as a whole: a row freezes when it is done, whatever the others
    do. Besides the products, an iteration is one fused kernel. Nothing synchronises on CUDA.

    Args:
        matvec: maps [B, D] to [B, D], row i by `H_i`; called at most `max_iter` times, and once
            more for `x0`.
        b: right-hand sides, [B, D], float32 or float64.
        lam: Λ: a float, or a tensor of shape [], [1] (scalar) or [D] (diagonal).
        damping: added to the diagonal.
        rtol, atol: a row stops when `|r| <= max(atol, rtol |b|)`; with both 0 it stops at `r = 0`.
        x0: where to start, [B, D]; default 0.

    Returns:
        `value` is x and `residual` the recurrence's `|r|`. A row with `b = 0` is CONVERGED in 0
        steps. A row whose curvature `p·Ap` is not positive is NEGATIVE_CURVATURE and keeps the
        iterate before it; if that is its first, `x = x0 + r / Λ`, the solution without H, wherever
        Λ > 0. A row with a non-finite entry is NONFINITE and its value is 0. Norms are squared in
        float64 without scaling: float64 entries beyond 1e±150 overflow or vanish.

    Raises:
        TypeError, ValueError: `b`, `lam`, `x0` or a setting does not fit.
        RuntimeError: `matvec` returned something that is not [B, D] like `b`.
    """
    _check_settings(max_iter, rtol, atol, damping)
    if b.dim() != 2 or b.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"b must be [B, D] float32 or float64, got {list(b.shape)} {b.dtype}")
    flat_lam = _flat_lam(lam, b)
    b = b.detach().contiguous()
    if x0 is None:
        x, r = torch.zeros_like(b), b.clone()
    else:
        if x0.shape != b.shape or x0.dtype != b.dtype:
            raise ValueError(
                f"x0 must be {list(b.shape)} {b.dtype}, got {list(x0.shape)} {x0.dtype}"
            )
        x = x0.detach().clone(memory_format=torch.contiguous_format)
        r = b - (matvec(x).detach() + (flat_lam + damping) * x)
    with torch.no_grad():
        rr = row_dot(r, r)
        tol2 = (rtol * rtol * row_dot(b, b)).clamp_min(atol * atol)
        status = torch.full_like(rr, Status.RUNNING, dtype=torch.int32)
        status = torch.where(rr <= tol2, Status.CONVERGED, status)
        status = torch.where(rr.isfinite(), status, Status.NONFINITE).to(torch.int32)
        x = torch.where(rr.isfinite()[:, None], x, 0.0)
        p = r.clone()
    steps = torch.zeros_like(status)
    curvature, beta = rr.new_zeros(2, max_iter, b.shape[0])
    for k in range(max_iter):
        if b.device.type == "cpu" and not (status == Status.RUNNING).any():
            break
        hp = matvec(p).detach().contiguous()
        with torch.no_grad():
            cg_step_(
                x, r, p, hp, flat_lam, damping=damping, rr=rr, tol2=tol2, status=status,
                steps=steps, curvature=curvature[k], beta=beta[k],
            )  # fmt: skip
    count = steps + (status == Status.NEGATIVE_CURVATURE)
    status = torch.where(status == Status.RUNNING, Status.MAX_ITER, status).to(torch.int32)
    residual = torch.where(status == Status.NONFINITE, torch.nan, rr).sqrt()
    return Solution(x, status, steps, residual, Lanczos(curvature, beta, count))


def _check_settings(max_iter: int, rtol: float, atol: float, damping: float) -> None:
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    for name, value in (("rtol", rtol), ("atol", atol), ("damping", damping)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def _flat_lam(lam: float | Tensor, b: Tensor) -> Tensor:
    if not isinstance(lam, Tensor):
        if not math.isfinite(lam):
            raise ValueError(f"lam must be finite, got {lam}")
        return b.new_full((1,), lam)
    if lam.shape not in ((), (1,), (b.shape[1],)) or lam.dtype != b.dtype:
        raise ValueError(
            f"lam must be a scalar or [{b.shape[1]}] of {b.dtype}, "
            f"got {list(lam.shape)} {lam.dtype}"
        )
    return lam.detach().reshape(-1).contiguous()
