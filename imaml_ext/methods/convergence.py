"""A warning where a solve of `adapt` has not converged, from the error estimates of both."""

import sys
import warnings
from dataclasses import replace
from types import FrameType

import torch
from torch import Tensor

from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.solution import Solution

_LEVELS = (1.0, 0.5, 0.1)  # few texts, since Python shows each text once
_MOST_RITZ = 64  # the eigenvalues of a longer recurrence would take as long as the solve


class ConvergenceWarning(UserWarning):
    """A solve of `adapt` is off by an estimated 10% or more, and its gradient with it.

    `warnings.filterwarnings("ignore", category=imaml_ext.ConvergenceWarning)` switches it off.
    """


def warn_if_inaccurate(problem: Proximal, inner: Solution, linear: Solution, v: Tensor) -> None:
    """Warn if the estimated relative errors of phi and x exceed 10% in sum. Reads values.

    Errors and sizes are norms over all tasks; that of phi is relative to `phi - theta`. What the
    error of phi changes in v is not known here: the gradient may be less accurate.
    """
    from_linear = _linear_error(linear, v)
    from_inner = _inner_error(problem, inner, linear)
    total = from_linear + from_inner
    level = next((level for level in _LEVELS if total > level), None)
    if level is None:
        return
    if total == torch.inf:
        cause = "H + Λ is not positive definite at phi: take more inner steps, or raise lam"
    elif from_inner > from_linear:
        cause = "take more steps of the inner solver, or use another inner="
    else:
        cause = "raise max_iter of the linear solver, or use another linear="
    off = "adapt" if from_inner > from_linear else "the linear solve of adapt"
    warnings.warn(
        f"{off} has not converged: it is off by an estimated {level:.0%} or more, and the gradient "
        f"with it: {cause}; implicit_meta_grad reports on each task",
        ConvergenceWarning,
        stacklevel=_stacklevel(),
    )


def _linear_error(linear: Solution, v: Tensor) -> float:
    """Estimate of `|x - x*| / |x|`; without Ritz values `|r| / |v|`."""
    if linear.lanczos is None:
        return _ratio(linear.residual, v, 0.0)
    return _ratio(_shortened(linear).error_estimate, linear.value, 0.0)


def _inner_error(problem: Proximal, inner: Solution, linear: Solution) -> float:
    """Estimate of `|phi - phi*| / |phi - theta|`; of `|phi - phi*| / |phi|` without Λ.

    With the Gauss-Newton matrix, it assumes that its smallest eigenvalue is that of the Hessian.
    """
    if linear.lanczos is None:
        return 0.0
    measured = inner if inner.lanczos else replace(inner, lanczos=linear.lanczos)
    phi = inner.value
    rounding = torch.finfo(phi.dtype).eps ** 0.5 * phi.double().norm().item()
    change = phi - problem.theta if bool(problem.lam.values.any()) else phi
    return _ratio(_shortened(measured).error_estimate, change, rounding)


def _shortened(solution: Solution) -> Solution:
    lanczos = solution.lanczos
    if lanczos is None or len(lanczos.diagonal) <= _MOST_RITZ:
        return solution
    first = replace(
        lanczos,
        diagonal=lanczos.diagonal[:_MOST_RITZ],
        link=lanczos.link[: _MOST_RITZ - 1],
        count=lanczos.count.clamp_max(_MOST_RITZ),
    )
    return replace(solution, lanczos=first)


def _ratio(errors: Tensor, rows: Tensor, at_least: float) -> float:
    error: float = errors.norm().item()
    size: float = rows.double().norm().item() + at_least
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
