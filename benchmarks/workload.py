"""The batches of tasks that meta-gradients are timed on, with the paper's networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imaml_ext import module_loss
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import conv4, mlp
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.module_loss import ModuleLoss

# way, shot, tasks
IMAGES = {
    "omniglot-5w1s": (5, 1, 16),
    "omniglot-20w1s": (20, 1, 16),
    "omniglot-20w5s": (20, 5, 4),
}
WORKLOADS = ("sinusoid", *IMAGES)
# Large enough that every task has positive curvature, and small enough that no solve converges
# before its last iteration.
LAM_SINUSOID, LAM_IMAGES = 20.0, 50.0


@dataclass(frozen=True)
class Workload:
    """B tasks, a network, and the settings of their meta-gradient.

    Attributes:
        model, loss, params, layout: the network, its loss for one task, its D parameters.
        plain_loss: the same loss without this package, which torch.compile can trace.
        theta: the parameters as a row, [D].
        support, query: pairs (x [B, N, ...], y [B, N, ...]).
        inner_steps, cg_steps: steps of gradient descent, iterations of conjugate gradient.
        lam: the proximal strength.
    """

    name: str
    model: nn.Sequential
    loss: ModuleLoss
    plain_loss: Callable[[Params, Any], Tensor]
    params: Params
    layout: Layout
    theta: Tensor
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    inner_steps: int
    cg_steps: int
    lam: float

    @property
    def lr(self) -> float:
        return 0.5 / self.lam

    @property
    def tasks(self) -> int:
        return self.support[0].shape[0]

    def task(self, number: int) -> tuple[Any, Any]:
        """Support and query of one task."""
        support, query = (
            tuple(tensor[number] for tensor in pair) for pair in (self.support, self.query)
        )
        return support, query

    def settings(self) -> dict[str, Any]:
        return {
            "workload": self.name,
            "tasks": self.tasks,
            "dim": self.layout.dim,
            "inner_steps": self.inner_steps,
            "cg_steps": self.cg_steps,
        }


def make_workload(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    inner_steps: int = 16,
    cg_steps: int = 5,
    tasks: int | None = None,
    width: int | None = None,
) -> Workload:
    """A workload; parameters and data depend on the arguments only, up to rounding to `dtype`.

    Args:
        name: one of `WORKLOADS`.
        tasks: B; default: the workload's.
        width: filters of a convolution (64), or neurons of a hidden layer of the sinusoid (40).
    """
    torch.manual_seed(0)
    model: nn.Sequential
    if name == "sinusoid":
        hidden = width or 40
        model, criterion = mlp(1, hidden, hidden, 1), nn.functional.mse_loss
        batch = Sinusoid(tasks=tasks or 25, device=device, dtype=dtype).sample(0)
        support, query = batch.support, batch.query
    else:
        way, shot, own_tasks = IMAGES[name]
        tasks = tasks or own_tasks
        model, criterion = conv4(way, filters=width or 64), nn.functional.cross_entropy
        labels = torch.arange(way, device=device).repeat_interleave(shot).expand(tasks, -1)
        images = torch.rand(2, tasks, way * shot, 1, 28, 28, device=device).to(dtype)
        support, query = (images[0], labels), (images[1], labels)
    loss = module_loss(model.to(device, dtype), criterion)

    def plain_loss(params: Params, data: Any) -> Tensor:
        x, y = data
        return criterion(functional_call(model, params, (x,)), y)

    params = dict(model.named_parameters())
    layout = Layout(params)
    return Workload(
        name=name,
        model=model,
        loss=loss,
        plain_loss=plain_loss,
        params=params,
        layout=layout,
        theta=layout.flatten(params).detach(),
        support=support,
        query=query,
        inner_steps=inner_steps,
        cg_steps=cg_steps,
        lam=LAM_SINUSOID if name == "sinusoid" else LAM_IMAGES,
    )
