"""Parameters that are learned but not adapted: what all tasks have in common.

With shared parameters psi, phi_i is the minimum of `L̂_i(phi, psi) + 1/2 (phi - theta)' Λ (phi -
theta)`, and the implicit function theorem gives, with the x_i that theta's gradient needs,

    dF/dpsi = mean_i  ∂L_i/∂psi - x_i' ∂²L̂_i/∂phi∂psi:

how psi changes the query loss itself, and how it moves phi. Both are one backward pass for all
tasks. ANIL's body is psi, its head phi (Raghu, Raghu, Bengio, Vinyals 2020).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.objective import Objective


def check_shared(shared: Any, layout: Layout) -> Params:
    """The shared parameters, without their graph; {} for None.

    Raises:
        TypeError: not a mapping of names to tensors.
        ValueError: a name that is adapted too, or another dtype or device than theta's.
    """
    if shared is None or (isinstance(shared, Mapping) and not shared):
        return {}
    own = Layout(shared, "shared")
    for name in shared:
        if name in layout.shapes:
            raise ValueError(f"shared[{name!r}] is in params too: it is adapted, or it is shared")
    if own.dtype != layout.dtype or own.device != layout.device:
        raise ValueError(
            f"shared is {own.dtype} on {own.device}, but params are {layout.dtype} on "
            f"{layout.device}"
        )
    return {name: tensor.detach() for name, tensor in shared.items()}


def direct_gradient(judged: Objective, phi: Tensor, ok: Tensor) -> Params:
    """`Σ_i ∂L_i/∂psi` at phi [B, D], over the tasks that are ok, [B] bool."""

    def total(judged: Objective, phi: Tensor) -> Tensor:
        return torch.where(ok, judged.losses(phi), 0.0).sum()

    return _gradient(total, judged, phi, ok)


def gradient_through_phi(objective: Objective, phi: Tensor, x: Tensor, ok: Tensor) -> Params:
    """`-Σ_i x_i' ∂²L̂_i/∂phi∂psi` at phi [B, D], over the tasks that are ok, [B] bool."""
    x = torch.where(ok[:, None], x, 0.0)

    def total(objective: Objective, phi: Tensor) -> Tensor:
        return -(x * objective.differentiable_gradient(phi)).sum()

    return _gradient(total, objective, phi, ok)


def _gradient(
    total: Callable[[Objective, Tensor], Tensor], objective: Objective, phi: Tensor, ok: Tensor
) -> Params:
    # A task that is not ok weighs 0, but 0 times its NaN would be in the sum: another stands in.
    stand_in = torch.where(ok, torch.arange(len(ok), device=ok.device), ok.int().argmax())
    data = pytree.tree_map(lambda leaf: leaf[stand_in], objective.data)
    phi = phi[stand_in]
    psi = {name: t.detach().requires_grad_() for name, t in objective.shared.items()}
    with torch.enable_grad(), objective.computing(phi):
        at_psi = Objective(objective.loss, objective.layout, data, shared=psi)
        value = total(at_psi, phi)
        if not value.requires_grad:
            return {name: torch.zeros_like(t) for name, t in psi.items()}
        slopes = torch.autograd.grad(
            value, list(psi.values()), allow_unused=True, materialize_grads=True
        )
    return {
        name: torch.where(ok.any(), slope, 0.0) for name, slope in zip(psi, slopes, strict=True)
    }
