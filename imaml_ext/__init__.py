"""Implicit meta-gradients in PyTorch, for whole batches of tasks."""

from imaml_ext._version import __version__
from imaml_ext.cg import ConjugateGradient, conjugate_gradient
from imaml_ext.evaluation import Evaluation, evaluate
from imaml_ext.implicit import adapt, implicit_meta_grad
from imaml_ext.inner import (
    LBFGS,
    Adam,
    Backtracking,
    External,
    GradientDescent,
    HessianFree,
    InnerSolver,
)
from imaml_ext.linear import LinearSolver
from imaml_ext.maml import FOMAML, MAML, Reptile, TruncatedMAML
from imaml_ext.meta_gradient import ImplicitMetaGradient, MetaGradient
from imaml_ext.methods import IMAML, Method
from imaml_ext.minres import MINRES
from imaml_ext.neumann import NeumannSeries
from imaml_ext.objective import module_loss
from imaml_ext.ops import build_info
from imaml_ext.proximal import Proximal
from imaml_ext.recording import RecordedMetaGradient
from imaml_ext.solution import Solution, Status
from imaml_ext.strength import ProximalStrength
from imaml_ext.tasks import TaskBatch, TaskSource
from imaml_ext.trainer import Trainer

__all__ = [
    "FOMAML",
    "IMAML",
    "LBFGS",
    "MAML",
    "MINRES",
    "Adam",
    "Backtracking",
    "ConjugateGradient",
    "Evaluation",
    "External",
    "GradientDescent",
    "HessianFree",
    "ImplicitMetaGradient",
    "InnerSolver",
    "LinearSolver",
    "MetaGradient",
    "Method",
    "NeumannSeries",
    "Proximal",
    "ProximalStrength",
    "RecordedMetaGradient",
    "Reptile",
    "Solution",
    "Status",
    "TaskBatch",
    "TaskSource",
    "Trainer",
    "TruncatedMAML",
    "__version__",
    "adapt",
    "build_info",
    "conjugate_gradient",
    "evaluate",
    "implicit_meta_grad",
    "module_loss",
]
