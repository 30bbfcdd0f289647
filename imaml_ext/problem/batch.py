"""Checks of the data of a batch of tasks: the leaves of pytrees of [B, N, ...] tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imaml_ext.problem.layout import Layout


def count_tasks(layout: Layout, leaves: Sequence[Any], label: str) -> int:
    """The number of tasks, B.

    Raises:
        TypeError: a leaf is not a dense tensor, or its floating dtype differs from the layout's.
        ValueError: there are no leaves, B or N is 0, leading sizes or devices differ, or a leaf was
            created in inference mode.
    """
    if not leaves:
        raise ValueError(f"{label} has no tensors")
    for number, leaf in enumerate(leaves):
        place = f"{label} (tensor {number})"
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{place} must be a tensor, got {type(leaf).__name__}")
        if leaf.layout != torch.strided:
            raise TypeError(f"{place} is {leaf.layout}: pass a dense tensor, by to_dense()")
        if leaf.is_inference():
            raise ValueError(
                f"{place} was created in inference mode, and cannot be differentiated through: "
                "pass its clone()"
            )
        if leaf.dim() == 0:
            raise ValueError(f"{place} must be [B, ...], got a 0-d tensor")
        if leaf.numel() == 0:
            raise ValueError(f"{place} is empty: shape {list(leaf.shape)}")
        if leaf.device != layout.device:
            raise ValueError(f"{place} is on {leaf.device}, the parameters on {layout.device}")
        if (leaf.is_floating_point() or leaf.is_complex()) and leaf.dtype != layout.dtype:
            raise TypeError(
                f"{place} is {leaf.dtype}, the parameters are {layout.dtype}: convert it, by "
                f".to({layout.dtype})"
            )
    sizes: list[int] = [leaf.shape[0] for leaf in leaves]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{label}: every tensor must have the same leading size B, the number of tasks, "
            f"got {sizes}: stack the tasks; pad and mask examples where their numbers differ"
        )
    return sizes[0]


def check_constant(leaves: Sequence[Tensor], label: str) -> None:
    """Raises ValueError if a leaf requires grad."""
    for number, leaf in enumerate(leaves):
        if leaf.requires_grad:
            raise ValueError(
                f"{label} (tensor {number}) requires grad, but only adapt differentiates by data, "
                "and only by support: use adapt, or detach it"
            )


def versions(leaves: Sequence[Tensor]) -> list[int]:
    """The version counters of the tensors, which in-place operators increment.

    Tensors of inference mode have none, and get 0.
    """
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]
