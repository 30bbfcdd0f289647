"""The operators of the extension, with their derivatives."""

from imaml_ext.ops.batch_norm import batch_norm, batch_norm_backward, batch_norm_double_backward
from imaml_ext.ops.conv import (
    conv,
    conv_data_gradient,
    conv_weight_gradient,
    patches,
    patches_transpose,
)
from imaml_ext.ops.extension import WITHOUT_CUDA, build_info
from imaml_ext.ops.rows import (
    cg_step_,
    cluster_occupancy,
    prox_adam_,
    prox_gd_,
    prox_norms,
    row_dot,
)

__all__ = [
    "WITHOUT_CUDA",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "build_info",
    "cg_step_",
    "cluster_occupancy",
    "conv",
    "conv_data_gradient",
    "conv_weight_gradient",
    "patches",
    "patches_transpose",
    "prox_adam_",
    "prox_gd_",
    "prox_norms",
    "row_dot",
]
