"""Implicit meta-gradients in PyTorch, for whole batches of tasks."""

from imaml_ext._version import __version__
from imaml_ext.cg import ConjugateGradient, conjugate_gradient
from imaml_ext.implicit import MetaGradient, adapt, implicit_meta_grad
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.methods import IMAML, Method
from imaml_ext.objective import module_loss
from imaml_ext.ops import build_info
from imaml_ext.solution import Solution, Status
from imaml_ext.tasks import TaskBatch, TaskSource
from imaml_ext.trainer import Evaluation, Trainer, evaluate

__all__ = [
    "IMAML",
    "ConjugateGradient",
    "Evaluation",
    "GradientDescent",
    "InnerSolver",
    "MetaGradient",
    "Method",
    "Solution",
    "Status",
    "TaskBatch",
    "TaskSource",
    "Trainer",
    "__version__",
    "adapt",
    "build_info",
    "conjugate_gradient",
    "evaluate",
    "implicit_meta_grad",
    "module_loss",
]
