"""Inner solvers: `phi_i = argmin G_i`; see `Proximal`."""

from imaml_ext.solvers.inner.adam import Adam
from imaml_ext.solvers.inner.base import InnerSolver
from imaml_ext.solvers.inner.external import External
from imaml_ext.solvers.inner.gradient_descent import GradientDescent
from imaml_ext.solvers.inner.hessian_free import HessianFree
from imaml_ext.solvers.inner.lbfgs import LBFGS
from imaml_ext.solvers.inner.line_search import Backtracking
from imaml_ext.solvers.inner.step_size import StepSize

__all__ = [
    "LBFGS",
    "Adam",
    "Backtracking",
    "External",
    "GradientDescent",
    "HessianFree",
    "InnerSolver",
    "StepSize",
]
