"""The C++/CUDA operators: those on rows as functions, those of the layers with derivatives."""

from imaml_ext.ops.extension import WITHOUT_CUDA, build_info
from imaml_ext.ops.rows import (
    cg_step_,
    cluster_occupancy,
    prox_adam_,
    prox_gd_,
    prox_norms,
    pull_back,
    row_dot,
)

__all__ = [
    "WITHOUT_CUDA",
    "build_info",
    "cg_step_",
    "cluster_occupancy",
    "prox_adam_",
    "prox_gd_",
    "prox_norms",
    "pull_back",
    "row_dot",
]
