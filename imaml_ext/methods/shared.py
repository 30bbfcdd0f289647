"""Gradients by what the losses depend on besides phi: shared parameters, and data.

With psi such a tensor, phi_i is the minimum of `L̂_i(phi, psi) + 1/2 (phi - theta)' Λ (phi -
theta)`. With the x_i of theta's gradient, the implicit function theorem gives

    dF/dpsi = mean_i  ∂L_i/∂psi - x_i' ∂²L̂_i/∂phi∂psi,

the direct effect of psi on the query loss, and the effect through phi. Each term is one backward
pass for all tasks. In ANIL, psi is the body and phi the head (Raghu, Raghu, Bengio, Vinyals 2020);
with features of a body as the data, psi is the features (Lee, Maji, Ravichandran, Soatto 2019).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.problem.objective import Loss, Objective


def check_shared(shared: Any, layout: Layout, *losses: Loss | None) -> Params:
    """The shared parameters, detached; {} for None.

    Args:
        losses: all that may use them; a `module_loss` uses those of its model and criterion.

    Raises:
        TypeError: not a mapping of names to tensors.
        ValueError: a name is in params too, no loss can use it, or dtype or device differ from
            those of params.
    """
    if shared is None or (isinstance(shared, Mapping) and not shared):
        return {}
    own = Layout(shared, "shared")
    for name in shared:
        if name in layout.shapes:
            raise ValueError(f"shared[{name!r}] is also in params: remove it from one of them")
    used = [_names(loss) for loss in losses if loss is not None]
    unused = [name for name in shared if used and not any(_uses(name, names) for names in used)]
    if unused:
        raise ValueError(
            f"shared[{unused[0]!r}] is used by no loss: module_loss uses the parameters of its "
            "model, and of a criterion that is a module, by their names"
        )
    if own.dtype != layout.dtype or own.device != layout.device:
        raise ValueError(
            f"shared is {own.dtype} on {own.device}, but params are {layout.dtype} on "
            f"{layout.device}"
        )
    return {name: tensor.detach() for name, tensor in shared.items()}


def _names(loss: Loss) -> set[str] | None:
    """Names that a loss can use; None: any."""
    if not isinstance(loss, ModuleLoss):
        return None
    modules: list[nn.Module] = [loss.model]
    if isinstance(loss.criterion, nn.Module):
        modules.append(loss.criterion)
    return {
        name
        for module in modules
        for tensors in (module.named_parameters, module.named_buffers)
        for name, _ in tensors(remove_duplicate=False)
    }


def _uses(name: str, names: set[str] | None) -> bool:
    return names is None or name.removeprefix("criterion.") in names


def direct_gradient(
    query_objective: Objective, phi: Tensor, ok: Tensor, weights: Tensor | None = None
) -> list[Tensor]:
    """`Σ_i w_i ∂L_i/∂psi` for each shared psi, at phi [B, D], over the tasks that are ok, [B] bool.

    Without weights [B], `w_i = 1`.
    """

    def total(at_psi: Objective, phi: Tensor) -> Tensor:
        losses = torch.where(ok, at_psi.losses(phi), 0.0)
        return losses.sum() if weights is None else (losses * weights).sum()

    return _gradients(total, query_objective, phi, ok)


def gradient_through_phi(
    objective: Objective,
    phi: Tensor,
    x: Tensor,
    ok: Tensor,
    first_order: Tensor,
    leaves: Sequence[int] = (),
) -> list[Tensor]:
    """`-Σ_i x_i' ∂²L̂_i/∂phi∂psi` at phi [B, D], over the tasks that are ok, [B] bool.

    Args:
        objective, phi, x, ok: the support losses, phi [B, D], x [B, D].
        first_order: tasks in which phi is taken not to depend on psi, [B] bool.
        leaves: numbers of the leaves of the data to differentiate by; the rows of those tasks that
            are not ok are undefined.

    Returns:
        The gradients of the shared parameters, then those of the leaves.
    """
    x = torch.where((ok & ~first_order)[:, None], x, 0.0)

    def total(at_psi: Objective, phi: Tensor) -> Tensor:
        return -(x * at_psi.differentiable_gradient(phi)).sum()

    return _gradients(total, objective, phi, ok, leaves)


def all_finite(gradients: Params) -> Tensor:
    """Whether every entry of these gradients, at least one, is finite; 0-d bool."""
    return torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()


def replacement(ok: Tensor) -> Tensor:
    """For each task the number of one that is ok, [B]: its own, or that of the first."""
    return torch.where(ok, torch.arange(len(ok), device=ok.device), ok.int().argmax())


def _gradients(
    total: Callable[[Objective, Tensor], Tensor],
    objective: Objective,
    phi: Tensor,
    ok: Tensor,
    leaves: Sequence[int] = (),
) -> list[Tensor]:
    # The weight of a failed task is 0, but 0 times its NaN is NaN: compute another task instead.
    instead = replacement(ok)
    data, structure = pytree.tree_flatten(objective.data)
    data = [leaf[instead] for leaf in data]
    shared = {name: t.detach().requires_grad_() for name, t in objective.shared.items()}
    inputs = [*shared.values(), *(data[number].requires_grad_() for number in leaves)]
    at_psi = objective.with_inputs(pytree.tree_unflatten(data, structure), shared)
    with torch.enable_grad(), objective.computing():
        value = total(at_psi, phi[instead])
        if not value.requires_grad:
            return [torch.zeros_like(each) for each in inputs]
        gradients = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return [torch.where(ok.any(), gradient, 0.0) for gradient in gradients]
