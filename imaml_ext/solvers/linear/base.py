"""Linear solvers for `(H_i + Λ + damping I) x_i = b_i`: the system and the base class."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from imaml_ext._checks import check_choice, check_integer, check_like, check_range
from imaml_ext._tracing import may_read_values
from imaml_ext.ops.rows import is_not_finite, row_dot
from imaml_ext.problem.lam import lam_of_rows
from imaml_ext.problem.objective import CurvatureKind, Matvec
from imaml_ext.programs.task_program import CgResult, Continuation
from imaml_ext.solvers.solution import Solution, Status, checked_solution


class LinearSystem:
    """`(H_i + Λ + damping I) x_i = b_i` for every row i, as passed to a `LinearSolver`.

    Args:
        matvec: maps [B, D] to [B, D], row i by `H_i`.
        b: right-hand sides, [B, D]; as an attribute contiguous and without a graph.
        lam: Λ, as in `conjugate_gradient`; as an attribute a `LamOperator`.
        damping: added to the diagonal.
        second_moment: that of the inner solver's gradients, [B, D]; None if it kept none.

    Attributes:
        x0: where the solve starts, [B, D]; None for 0. Then b is `b - A x0`: a solver computes the
            correction of x0, starting from 0.
        norm: `|b|` of the given b, [B] float64, if there is an x0: tolerances are relative to it.
        is_final: set by a solver that completes its statuses, if all rows are finite.

    Raises:
        TypeError, ValueError: an argument, or a result of matvec, is invalid.
    """

    def __init__(
        self,
        matvec: Matvec,
        b: Tensor,
        lam: float | Tensor,
        damping: float,
        second_moment: Tensor | None = None,
    ) -> None:
        if not isinstance(b, Tensor):
            raise TypeError(f"b must be a tensor, got {type(b).__name__}")
        if b.dim() != 2 or b.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"b must be [B, D] float32 or float64, got {list(b.shape)} {b.dtype}")
        if damping > torch.finfo(b.dtype).max:
            raise ValueError(f"damping must be finite, got {damping}, in {b.dtype}")
        self.b = b.detach().contiguous().resolve_neg()
        self.lam = lam_of_rows(lam, b)
        self.damping = damping
        self.second_moment = second_moment
        self.x0: Tensor | None = None
        self.norm: Tensor | None = None
        self.is_final = False
        self._matvec = matvec
        # Conjugate gradient by one call; None if matvec has no program.
        self.conjugate_gradient: Callable[..., CgResult] | None = None
        if isinstance(matvec, Continuation) and self.lam.is_fused:
            self.conjugate_gradient = matvec.conjugate_gradient
        self._grad_enabled = torch.is_grad_enabled()  # as the caller's matvec expects it

    def start_at(self, x0: Tensor, *, only_if_better: bool = False) -> None:
        """Replace b by `b - A x0`, so that a solver computes the correction of x0.

        Args:
            x0: [B, D].
            only_if_better: start from 0 in the rows where x0 is not finite, or where
                `|b - A x0| >= |b|`.
        """
        check_like("x0", x0, self.b)
        x0 = x0.detach().clone(memory_format=torch.contiguous_format)
        bb = row_dot(self.b, self.b)
        r = self.b - self.product(x0)
        if only_if_better:
            better = (row_dot(r, r) < bb)[:, None]
            x0, r = torch.where(better, x0, 0.0), torch.where(better, r, self.b)
        self.x0, self.norm, self.b = x0, bb.sqrt(), r

    def curvature_product(self, p: Tensor) -> Tensor:
        """`H_i p_i` for every row, [B, D], contiguous."""
        with torch.set_grad_enabled(self._grad_enabled):
            hp = self._matvec(p)
        if not isinstance(hp, Tensor):
            raise TypeError(f"matvec must return a tensor, got {type(hp).__name__}")
        check_like("the result of matvec", hp, p)
        return hp.detach().contiguous()

    def unfused_product(self, p: Tensor) -> Tensor:
        """`H p`, plus `Λ p` unless the kernels add it; `cg_step_` adds the rest of the product."""
        return self.lam.add_unfused(self.curvature_product(p), p)

    def product(self, p: Tensor) -> Tensor:
        """`(H_i + Λ + damping I) p_i` for every row, [B, D]."""
        return self.unfused_product(p) + (self.lam.fused + self.damping) * p


@dataclass(frozen=True)
class LinearSolver(ABC):
    """Settings of the linear solve `(H + Λ + damping I) x = v` of a meta-gradient.

    A subclass implements `_solve(system)`, which receives a checked `LinearSystem` and returns a
    `Solution`, starting from x = 0; it runs under `torch.no_grad`. If `solve` is given an x0, b of
    the system is `b - A x0`, and `solve` adds x0 to the value that `_solve` returns. It also
    sets the final statuses: where the residual does not exceed the tolerance described below, a
    RUNNING row becomes CONVERGED, elsewhere MAX_ITER, and so does a CONVERGED row above twice the
    tolerance.

    Args:
        max_iter: maximum number of products with H, without those for x0 and for the check below.
        rtol, atol: a task stops when the recurrence's `|r| <= max(atol, rtol |v|)`, or
            `|r| <= eps |v|`, below which it only computes rounding errors. The task is CONVERGED if
            then `|v - A x| <= 2 max(atol, rtol |v|, 10 eps |v|)`. Where the recurrence may have
            drifted that is measured, by one product for all tasks: on the CPU only if a task needs
            it, on an accelerator and in a recording always. With rtol = atol = 0, the default, no
            product is computed: CONVERGED means that the bound `|r| + drift` is at most
            `2000 eps |v|`.
        damping: added to the diagonal.
        curvature: what H is: "hessian", the Hessian of the support loss, or "ggn", its generalised
            Gauss-Newton matrix, positive semi-definite for the usual losses, for which the loss
            must come from `module_loss` (Schraudolph 2002).

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.
    """

    # Whether the statuses that `_solve` of this class returns agree with its residuals.
    _completes_status: ClassVar[bool] = False

    max_iter: int = 5
    rtol: float = 0.0
    atol: float = 0.0
    damping: float = 0.0
    curvature: CurvatureKind = "hessian"

    def __init_subclass__(cls) -> None:
        if "_solve" in vars(cls):  # which may have changed what the inherited one returned
            cls._completes_status = vars(cls).get("_completes_status", False)

    def __post_init__(self) -> None:
        check_integer("max_iter", self.max_iter, minimum=1)
        for name in ("rtol", "atol", "damping"):
            check_range(name, getattr(self, name), "[0, inf)")
        check_choice("curvature", self.curvature, ("hessian", "ggn"))

    def solve(
        self,
        matvec: Matvec,
        b: Tensor,
        lam: float | Tensor = 0.0,
        *,
        second_moment: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> Solution:
        """Solve for every row of b [B, D]; each row stops independently.

        On an accelerator a solve of more than 64 iterations synchronises every 64, to stop when all
        rows are done; never while being recorded.

        Args:
            matvec: maps [B, D] to [B, D], row i by `H_i`, symmetric.
            b: right-hand sides, [B, D], float32 or float64.
            lam: Λ, as in `conjugate_gradient`.
            second_moment: that of the inner solver's gradients, [B, D], if it kept one.
            x0: initial x, [B, D], such as the solution of a similar system; default 0. It costs one
                product. A row whose x0 is not finite, or no better than 0, starts from 0.

        Returns:
            `value` is x [B, D], `residual` is `|b - A x|` [B], measured or by the recurrence, and
            `lanczos` the curvature, if the solver measures it. A row that is not finite is
            NONFINITE and its value is 0. One that is NEGATIVE_CURVATURE with 0 steps has the value
            `Λ^-1 b`, whatever x0 is.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """
        system = LinearSystem(matvec, b, lam, self.damping, second_moment)
        given = system.b
        with torch.no_grad():
            if x0 is not None:
                system.start_at(x0, only_if_better=True)
            found = checked_solution(self, self._solve(system), system.b)
            if not self._completes_status:
                system.is_final = False
                found = _completed(system, found, self.rtol, self.atol)
            solution = finished(system, found)
            if system.norm is None and self._completes_status:
                return solution
            at_once = (solution.status == Status.NEGATIVE_CURVATURE) & (solution.steps == 0)
            norm = row_dot(given, given).sqrt() if system.norm is None else system.norm
            return replace(
                solution,
                value=torch.where(at_once[:, None], system.lam.solve(given), solution.value),
                residual=torch.where(at_once, norm, solution.residual),
            )

    @abstractmethod
    def _solve(self, system: LinearSystem) -> Solution:
        """Solve the system. Rows may be left RUNNING or not finite: `solve` sets their status.

        `residual` is `|b - A x|`; `lanczos` may be None, and then there is no `error_estimate`.
        """


def squared_tolerance(system: LinearSystem, bb: Tensor, rtol: float, atol: float) -> Tensor:
    """`max(atol, rtol |b|, eps |b|)²` of every row, [B] float64, with b as given by the caller.

    Args:
        bb: b·b of the system's b.
    """
    rtol = max(rtol, torch.finfo(system.b.dtype).eps)
    bb = bb if system.norm is None else system.norm.square()
    return (rtol * rtol * bb).clamp_min(atol * atol)


def initial_status(rr: Tensor, tol2: Tensor) -> Tensor:
    """Status before the first iteration, from r·r and the squared tolerance, [B] int32."""
    status = torch.zeros_like(rr, dtype=torch.int32).masked_fill_(rr <= tol2, Status.CONVERGED)
    return status.masked_fill_(is_not_finite(rr), Status.NONFINITE)


def with_true_residual(
    system: LinearSystem, solution: Solution, norm: Tensor, rtol: float, atol: float, drift: Tensor
) -> Solution:
    """The solution, CONVERGED only where `|b - A x|` is at most twice the tolerance.

    A row whose recurrence cannot have drifted, `drift <= max(residual, tolerance)`, is unchanged.
    The others, unless they stopped early with another status, get their true residual by one
    product for all rows; on the CPU it is skipped if no row needs it. With rtol = atol = 0 there is
    no product: the tolerance is then `1000 eps |b|`, and the others get the bound
    `residual + drift`.

    Args:
        norm: `|b|` of the system's b, [B] float64.
        rtol, atol: those of the solve.
        drift: bound of the difference between `solution.residual` and `|b - A x|`, [B] float64.
    """
    measures, tol = rtol > 0 or atol > 0, _tolerance(system, norm, rtol, atol)
    doubtful = drift > torch.maximum(solution.residual, tol)
    if may_read_values(drift) and not bool(doubtful.any()):
        return solution
    doubtful &= solution.status <= Status.MAX_ITER  # or RUNNING: all steps taken
    residual = solution.residual + drift
    if measures:
        rest = system.b - system.product(solution.value)
        residual = row_dot(rest, rest).sqrt()
    fails = doubtful & (solution.status == Status.CONVERGED) & ~(residual <= 2 * tol)
    return replace(
        solution,
        status=solution.status.masked_fill(fails, Status.MAX_ITER),
        residual=torch.where(doubtful, residual, solution.residual),
    )


def _tolerance(system: LinearSystem, norm: Tensor, rtol: float, atol: float) -> Tensor:
    """The residual at which a row counts as converged, within a factor of 2, [B] float64."""
    norm = norm if system.norm is None else system.norm
    floor = (10 if rtol > 0 or atol > 0 else 1000) * torch.finfo(system.b.dtype).eps
    return (max(rtol, floor) * norm).clamp_min(atol)


def _completed(system: LinearSystem, solution: Solution, rtol: float, atol: float) -> Solution:
    """The solution with statuses that agree with its residuals."""
    status, residual = solution.status, solution.residual
    tol = _tolerance(system, row_dot(system.b, system.b).sqrt(), rtol, atol)
    reached = (status == Status.RUNNING) & (residual <= tol)
    missed = (status == Status.CONVERGED) & ~(residual <= 2 * tol)
    status = status.masked_fill(reached, Status.CONVERGED)
    return replace(solution, status=status.masked_fill(missed, Status.MAX_ITER))


def finished(system: LinearSystem, solution: Solution) -> Solution:
    """The solution including x0, with final statuses.

    They are MAX_ITER instead of RUNNING, and NONFINITE where the value is not finite.
    """
    if system.is_final:
        return solution
    x, status = solution.value, solution.status
    if system.x0 is not None:
        x = system.x0 + x
    failed = status == Status.NONFINITE
    # A finite sum of squares, without a pass that writes, has finite terms only.
    if not may_read_values(x) or bool((failed | is_not_finite(row_dot(x, x))).any()):
        failed |= ~x.isfinite().all(1)
        x = x.masked_fill(failed[:, None], 0.0)
    status = status.masked_fill(status == Status.RUNNING, Status.MAX_ITER)
    return replace(
        solution,
        value=x,
        status=status.masked_fill_(failed, Status.NONFINITE),
        residual=solution.residual.masked_fill(failed, torch.nan),
    )
