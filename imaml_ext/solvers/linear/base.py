"""What every batched linear solver shares: settings, and `(H + Λ + damping I) x = b`."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext._checks import check_integer, check_like
from imaml_ext.ops.rows import row_dot
from imaml_ext.problem.lam import flatten_solver_lam, matrix_product
from imaml_ext.problem.objective import CurvatureKind, Matvec
from imaml_ext.solvers.solution import Lanczos, Solution, Status


@dataclass(frozen=True)
class LinearSolver(ABC):
    """Settings of the linear solve `(H + Λ + damping I) x = v` of a meta-gradient.

    Args:
        max_iter: products with H at most.
        rtol, atol: a task stops when `|r| <= max(atol, rtol |v|)`, or `|r| <= eps |v|`, below which
            a recurrence computes rounding errors.
        damping: added to the diagonal.
        curvature: what H is: "hessian", the Hessian of the support loss, or "ggn", its generalised
            Gauss-Newton matrix, positive semi-definite for the usual losses, for which the loss
            must come from `module_loss` (Schraudolph 2002).

    Raises:
        ValueError: a setting is out of range.
    """

    max_iter: int = 5
    rtol: float = 0.0
    atol: float = 0.0
    damping: float = 0.0
    curvature: CurvatureKind = "hessian"

    def __post_init__(self) -> None:
        check_settings(self.max_iter, self.rtol, self.atol, self.damping)
        if self.curvature not in ("hessian", "ggn"):
            raise ValueError(f"curvature must be 'hessian' or 'ggn', got {self.curvature!r}")

    @abstractmethod
    def solve(
        self,
        matvec: Matvec,
        b: Tensor,
        lam: float | Tensor = 0.0,
        *,
        second_moment: Tensor | None = None,
    ) -> Solution:
        """Solve for every row of b [B, D], from x = 0; nothing is decided for the batch as a whole.

        On an accelerator a solve of more than 64 iterations waits for the device every 64, to see
        if all rows are done; not while it is recorded.

        Args:
            matvec: maps [B, D] to [B, D], row i by `H_i`, symmetric.
            b: right-hand sides, [B, D], float32 or float64.
            lam: Λ: a float, or a tensor of shape [], [1] (scalar), [D] (diagonal), [D, D] (dense).
            second_moment: of the inner solver's gradients, [B, D], where it kept one.

        Returns:
            `value` is x [B, D], `residual` is `|r|` [B], and `lanczos` the curvature seen, where
            the solver measures it.

        Raises:
            TypeError, ValueError: the arguments do not fit.
        """


class System:
    """`(H_i + Λ + damping I) x_i = b_i` for every row i, its arguments checked.

    Attributes:
        b: [B, D], contiguous.
        fused: what of Λ the kernels add by themselves, [1] or [D]: all but a dense one.
    """

    def __init__(self, matvec: Matvec, b: Tensor, lam: float | Tensor, damping: float) -> None:
        if not isinstance(b, Tensor):
            raise TypeError(f"b must be a tensor, got {type(b).__name__}")
        if b.dim() != 2 or b.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"b must be [B, D] float32 or float64, got {list(b.shape)} {b.dtype}")
        self.b = b.detach().contiguous()
        if damping > torch.finfo(b.dtype).max:
            raise ValueError(f"damping must be finite, got {damping}, in {b.dtype}")
        self.damping = damping
        self._matvec = matvec
        flat_lam = flatten_solver_lam(lam, b)
        self._dense = flat_lam if flat_lam.dim() == 2 else None
        self.fused = flat_lam if self._dense is None else flat_lam.new_zeros(1)

    def unfused(self, p: Tensor) -> Tensor:
        """`H p`, and `Λ p` for a dense Λ: what the kernels do not add by themselves."""
        hp = self._matvec(p)
        if not isinstance(hp, Tensor):
            raise TypeError(f"matvec must return a tensor, got {type(hp).__name__}")
        check_like("what matvec returns", hp, p)
        hp = hp.detach()
        return (hp if self._dense is None else hp + matrix_product(p, self._dense)).contiguous()

    def product(self, p: Tensor) -> Tensor:
        """`(H + Λ + damping I) p`."""
        return self.unfused(p) + (self.fused + self.damping) * p

    @property
    def is_dense(self) -> bool:
        return self._dense is not None

    def without_h(self, r: Tensor) -> Tensor:
        """`Λ^-1 r`, the solution without H; 0 where Λ is not positive."""
        if self._dense is None:
            return torch.where(self.fused > 0, r / self.fused, 0.0)
        factor, info = torch.linalg.cholesky_ex(self._dense)
        return torch.where(info == 0, torch.cholesky_solve(r.T, factor).T, 0.0)


def squared_tolerance(b: Tensor, rtol: float, atol: float) -> Tensor:
    """`max(atol, rtol |b|, eps |b|)²` of every row, [B] float64."""
    rtol = max(rtol, torch.finfo(b.dtype).eps)
    return (rtol * rtol * row_dot(b, b)).clamp_min(atol * atol)


def initial_status(rr: Tensor, tol2: Tensor) -> Tensor:
    """Of a solve about to begin, from r·r and the squared tolerance, [B] int32."""
    status = torch.where(rr <= tol2, Status.CONVERGED, Status.RUNNING)
    return torch.where(rr.isfinite(), status, Status.NONFINITE).to(torch.int32)


def finished(
    x: Tensor, status: Tensor, steps: Tensor, residual: Tensor, lanczos: Lanczos | None = None
) -> Solution:
    """The solution as it is returned: a row that is not finite is NONFINITE, its value 0."""
    finite = x.isfinite().all(1) & (status != Status.NONFINITE)
    status = torch.where(status == Status.RUNNING, Status.MAX_ITER, status)
    return Solution(
        torch.where(finite[:, None], x, 0.0),
        torch.where(finite, status, Status.NONFINITE).to(torch.int32),
        steps,
        torch.where(finite, residual, torch.nan),
        lanczos,
    )


def check_settings(max_iter: int, rtol: float, atol: float, damping: float) -> None:
    check_integer("max_iter", max_iter)
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    for name, value in (("rtol", rtol), ("atol", atol), ("damping", damping)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
