"""What the code released with the paper computes in place of the paper's formulas.

For comparison only. Source: https://github.com/aravindr93/imaml_dev.
"""

from copy import copy
from dataclasses import dataclass, replace

import torch

from imaml_ext._checks import check_range
from imaml_ext.problem.lam_operator import LamOperator
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner.base import unverified
from imaml_ext.solvers.inner.gradient_descent import GradientDescent
from imaml_ext.solvers.linear.base import LinearSystem
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.solution import Solution


@dataclass(frozen=True)
class DescentThenProximal(GradientDescent):
    """Gradient descent on the loss alone, with the proximal term applied once after the last step:
    `phi = theta + (1 - lr lam) (phi_K - theta)`. Arguments as in `GradientDescent`."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        check_range("lr", self.lr, "(0, inf)")  # a number: `solve` multiplies Λ by it
        super().__post_init__()

    @torch.no_grad()
    def solve(self, problem: Proximal) -> Solution:
        solution = super().solve(problem.with_lam(problem.theta.new_zeros(1)))
        displacement = solution.value - problem.theta
        phi = solution.value - self.lr * problem.lam.mv(displacement)
        return unverified(phi, solution.status, solution.steps)


@dataclass(frozen=True)
class AuthorsCodeCG(ConjugateGradient):
    """Solve `(2 I + H / (lam + 10)) g = v` in place of the paper's `(I + H / lam) g = v`. Then g is
    nearly `v / 2`, the direction of first-order MAML. Arguments as in `ConjugateGradient`."""

    _completes_status = True

    def _solve(self, system: LinearSystem) -> Solution:
        if system.x0 is not None:
            raise ValueError("AuthorsCodeCG starts from 0, got x0: remove x0 or warm_start")
        if not system.lam.is_fused:
            raise ValueError("AuthorsCodeCG needs a scalar or diagonal lam, the same for all tasks")
        lam = system.lam.values
        other = copy(system)
        other.lam = LamOperator.of(2 * (lam + 10))
        solution = super()._solve(other)
        # The caller multiplies x by lam to get g. The Lanczos data is of another system.
        return replace(solution, value=solution.value * ((lam + 10) / lam), lanczos=None)
