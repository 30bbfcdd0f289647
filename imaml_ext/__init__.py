"""Implicit meta-gradients in PyTorch, for whole batches of tasks."""

from imaml_ext._version import __version__
from imaml_ext.data.mini_batches import MiniBatches
from imaml_ext.data.tasks import RecordableSource, ShardableSource, TaskBatch, TaskSource
from imaml_ext.methods.adapt import adapt
from imaml_ext.methods.base import Method
from imaml_ext.methods.convergence import ConvergenceWarning
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.implicit import implicit_meta_grad
from imaml_ext.methods.maml import FOMAML, MAML, TruncatedMAML
from imaml_ext.methods.meta_gradient import ImplicitMetaGradient, MetaGradient, Nonfinite
from imaml_ext.methods.reptile import Reptile
from imaml_ext.methods.step_weights import MultiStepLoss
from imaml_ext.methods.warm_start import WarmStart
from imaml_ext.ops.extension import build_info
from imaml_ext.problem.lam import Lam, ProximalStrength
from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import module_loss
from imaml_ext.problem.objective import CurvatureKind, Loss, Matvec
from imaml_ext.problem.programs import Programs
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import (
    LBFGS,
    Adam,
    Backtracking,
    External,
    GradientDescent,
    HessianFree,
    InnerSolver,
    StepSize,
)
from imaml_ext.solvers.linear.base import LinearSolver, LinearSystem
from imaml_ext.solvers.linear.cg import ConjugateGradient, conjugate_gradient
from imaml_ext.solvers.linear.minres import MINRES
from imaml_ext.solvers.linear.neumann import NeumannSeries
from imaml_ext.solvers.solution import Lanczos, Solution, Status
from imaml_ext.training.evaluation import Evaluation, Metric, evaluate
from imaml_ext.training.recorded import RecordedMetaGradient
from imaml_ext.training.trainer import NonfiniteError, Trainer

__all__ = [
    "FOMAML",
    "IMAML",
    "LBFGS",
    "MAML",
    "MINRES",
    "Adam",
    "Backtracking",
    "ConjugateGradient",
    "ConvergenceWarning",
    "CurvatureKind",
    "Evaluation",
    "External",
    "GradientDescent",
    "HessianFree",
    "ImplicitMetaGradient",
    "InnerSolver",
    "Lam",
    "Lanczos",
    "LinearSolver",
    "LinearSystem",
    "Loss",
    "Matvec",
    "MetaGradient",
    "Method",
    "Metric",
    "MiniBatches",
    "MultiStepLoss",
    "NeumannSeries",
    "Nonfinite",
    "NonfiniteError",
    "Params",
    "Programs",
    "Proximal",
    "ProximalStrength",
    "RecordableSource",
    "RecordedMetaGradient",
    "Reptile",
    "ShardableSource",
    "Solution",
    "Status",
    "StepSize",
    "TaskBatch",
    "TaskSource",
    "Trainer",
    "TruncatedMAML",
    "WarmStart",
    "__version__",
    "adapt",
    "build_info",
    "conjugate_gradient",
    "evaluate",
    "implicit_meta_grad",
    "module_loss",
]
