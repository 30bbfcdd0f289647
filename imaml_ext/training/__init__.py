"""The outer loop: trainer, evaluation, recording, checkpoints, logs and process groups."""

from imaml_ext.training.budget import Budget
from imaml_ext.training.capture import Capture, cuda_graph, no_capture
from imaml_ext.training.capture_programs import compiled
from imaml_ext.training.checkpoint import (
    evaluated_tensors,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from imaml_ext.training.distributed import process_group
from imaml_ext.training.evaluation import (
    Evaluation,
    accuracy,
    evaluate,
    per_task,
    support_accuracy,
)
from imaml_ext.training.logs import json_lines, tensorboard
from imaml_ext.training.recorded import RecordedMetaGradient
from imaml_ext.training.support_statistics import SupportStatistics
from imaml_ext.training.trainer import NonfiniteError, Trainer
from imaml_ext.training.weight_averaging import average_weights, averaged

__all__ = [
    "Budget",
    "Capture",
    "Evaluation",
    "NonfiniteError",
    "RecordedMetaGradient",
    "SupportStatistics",
    "Trainer",
    "accuracy",
    "average_weights",
    "averaged",
    "compiled",
    "cuda_graph",
    "evaluate",
    "evaluated_tensors",
    "json_lines",
    "load_checkpoint",
    "no_capture",
    "per_task",
    "process_group",
    "save_checkpoint",
    "save_model",
    "support_accuracy",
    "tensorboard",
]
