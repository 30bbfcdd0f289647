"""A warning where a solve of `adapt` has not converged, from the error estimates of both."""

import math
import sys
import warnings
from dataclasses import replace
from types import FrameType

import torch
from torch import Tensor

from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.solution import Lanczos, Solution, Status

_LEVELS = (1.0, 0.5, 0.1)  # few texts, since Python shows each text once
_MOST_RITZ = 64  # the eigenvalues of a longer recurrence would take as long as the solve


class ConvergenceWarning(UserWarning):
    """A solve of `adapt` is off by an estimated 10% or more, and so is its gradient.

    `warnings.filterwarnings("ignore", category=imaml_ext.ConvergenceWarning)` switches it off.
    """


def warn_if_inaccurate(problem: Proximal, inner: Solution, linear: Solution, v: Tensor) -> None:
    """Warn if the estimated relative errors of phi and x exceed 10% in sum. Reads values.

    Errors and sizes are norms over all tasks; that of phi is relative to `phi - theta`. The effect
    of phi's error on v is not included, so the gradient may be less accurate.
    """
    from_linear = _linear_error(linear, v)
    from_inner = _inner_error(problem, inner, linear, v)
    total = from_linear + from_inner
    level = next((level for level in _LEVELS if total > level), None)
    if level is None:
        return
    if total == torch.inf:
        cause = "H + Λ is not positive definite at phi: take more inner steps, or a larger lam"
    elif from_inner > from_linear:
        cause = _remedy(inner, "lower tol", "take more steps", "inner")
    else:
        cause = _remedy(linear, "lower rtol", "raise max_iter", "linear")
    off = "adapt" if from_inner > from_linear else "the linear solve of adapt"
    warnings.warn(
        f"{off} has not converged: it is off by an estimated {level:.0%} or more, and so is the "
        f"gradient: {cause}; implicit_meta_grad reports on each task",
        ConvergenceWarning,
        stacklevel=_stacklevel(),
    )


def _remedy(solution: Solution, if_converged: str, otherwise: str, which: str) -> str:
    converged = bool((solution.status == Status.CONVERGED).all())
    remedy = if_converged if converged else otherwise
    return f"{remedy} of the {which} solver, or pass another solver as {which}="


def _linear_error(linear: Solution, v: Tensor) -> float:
    """Estimate of `|x - x*| / |x|`; without Ritz values `|r| / |v|`.

    Infinite with negative curvature if there are no Ritz values.
    """
    if linear.lanczos is None:
        if bool((linear.status == Status.NEGATIVE_CURVATURE).any()):
            return math.inf
        return _ratio(linear.residual, _norms(v))
    mu, rounding, measured = _curvature(linear.lanczos, linear)
    residual = torch.maximum(linear.residual, rounding)
    return _ratio((residual / mu)[measured], _norms(linear.value)[measured])


def _inner_error(problem: Proximal, inner: Solution, linear: Solution, v: Tensor) -> float:
    """Estimate of `|phi - phi*| / |phi - theta|`; of `|phi - phi*| / |phi|` without Λ.

    With the Gauss-Newton matrix, it assumes that its smallest eigenvalue is that of the Hessian.
    """
    lanczos = inner.lanczos or linear.lanczos
    if lanczos is None:
        return 0.0
    phi = inner.value
    mu, rounding, measured = _curvature(lanczos, replace(linear, value=phi))
    # A warm start may solve the system without a product: then the curvature along x.
    along = row_dot(linear.value, v).abs() / row_dot(linear.value, linear.value)
    at_once = ~measured & along.isfinite()
    mu, measured = torch.where(at_once, along, mu), measured | at_once
    rounding = torch.where(at_once, torch.finfo(phi.dtype).eps * along * _norms(phi), rounding)
    residual = (inner.residual - 10 * rounding).clamp_min(0)
    change = phi - problem.theta if bool(problem.lam.values.any()) else phi
    floor = torch.finfo(phi.dtype).eps ** 0.5 * _norms(phi)
    error = torch.where(residual > 0, residual / mu, 0.0)
    return _ratio(error[measured], (_norms(change) + floor)[measured])


def _curvature(lanczos: Lanczos, solution: Solution) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest curvature of each task, 0 if negative curvature stopped the linear solve; the
    rounding error of a residual at `solution.value`; and which tasks had a product, [B] each.

    A task without one has v = 0 and contributes nothing to the gradient.
    """
    if len(lanczos.diagonal) > _MOST_RITZ:
        lanczos = replace(
            lanczos,
            diagonal=lanczos.diagonal[:_MOST_RITZ],
            link=lanczos.link[: _MOST_RITZ - 1],
            count=lanczos.count.clamp_max(_MOST_RITZ),
        )
    sizes = lanczos.ritz.abs()  # MINRES solves indefinite systems, too
    mu = torch.where(solution.status == Status.NEGATIVE_CURVATURE, 0.0, sizes.amin(1))
    rounding = torch.finfo(solution.value.dtype).eps * sizes.amax(1) * _norms(solution.value)
    return mu, rounding, lanczos.count > 0


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = rows.double().norm(dim=1)
    return norms


def _ratio(errors: Tensor, sizes: Tensor) -> float:
    error: float = errors.norm().item()
    size: float = sizes.norm().item()
    return error / size if error > 0 and size > 0 else error


def _stacklevel() -> int:
    """That of the first caller outside of torch and this package, which called backward."""
    frame: FrameType | None = sys._getframe(1)
    level = 0
    while frame is not None:
        level += 1
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package not in ("torch", __name__.split(".")[0]):
            return level
        frame = frame.f_back
    return 1
