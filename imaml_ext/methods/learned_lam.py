"""The proximal strength of a method: its value, and the gradients of its tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imaml_ext.methods.meta_gradient import named_lam
from imaml_ext.problem.lam import Lam, ProximalStrength
from imaml_ext.problem.layout import Params


def lam_value(lam: Lam | ProximalStrength | None) -> Lam:
    """Λ now, in the graph of a `ProximalStrength` in grad mode; 0 for None."""
    if lam is None:
        return 0.0
    return lam() if isinstance(lam, ProximalStrength) else lam


def learned_lam(lam: Any) -> Params:
    """The tensors of lam, or of a `ProximalStrength`, that require grad, by name."""
    if isinstance(lam, ProximalStrength):
        lam = dict(lam.named_parameters())
    return {name: tensor for name, tensor in named_lam(lam).items() if tensor.requires_grad}


def strength_gradients(lam: Any, value: Lam, gradient: Any) -> Params:
    """Gradients of the parameters of a `ProximalStrength`; {} for another lam.

    Args:
        value: `lam_value(lam)`, in its graph.
        gradient: with respect to the value, in the same form.
    """
    learned = learned_lam(lam)
    if not isinstance(lam, ProximalStrength) or not learned:
        return {}
    outputs, vectors = (list(named_lam(each).values()) for each in (value, gradient))
    gradients = torch.autograd.grad(outputs, list(learned.values()), vectors)
    return dict(zip(learned, gradients, strict=True))


def check_distinct(learned: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the same tensor is learned under two names."""
    if len({id(tensor) for tensor in learned.values()}) < len(learned):
        raise ValueError(
            "lam contains the same tensor under two names: use a ProximalStrength to learn it"
        )
