"""Inner solvers: `phi_i = argmin G_i`, see `Proximal`."""

from imaml_ext.inner.adam import Adam
from imaml_ext.inner.base import InnerSolver
from imaml_ext.inner.external import External
from imaml_ext.inner.gradient_descent import GradientDescent
from imaml_ext.inner.hessian_free import HessianFree
from imaml_ext.inner.lbfgs import LBFGS
from imaml_ext.inner.line_search import Backtracking

__all__ = [
    "LBFGS",
    "Adam",
    "Backtracking",
    "External",
    "GradientDescent",
    "HessianFree",
    "InnerSolver",
]
