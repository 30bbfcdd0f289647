"""Small bilevel problems with a smooth, strongly convex inner objective, and dense oracles."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from imaml_ext import module_loss
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.module_loss import ModuleLoss


@dataclass
class Problem:
    loss: ModuleLoss
    params: dict[str, Tensor]
    support: Any
    query: Any
    layout: Layout

    @property
    def tasks(self) -> int:
        return self.support[0].shape[0]

    def flat_loss(self, row: Tensor, data: Any) -> Tensor:
        return self.loss(self.layout.unflatten(row), data)

    def hessians(self, rows: Tensor) -> Tensor:
        """Dense support Hessians, [B, D, D]."""
        return vmap(jacrev(grad(self.flat_loss)))(rows, self.support)

    def query_gradients(self, rows: Tensor) -> Tensor:
        return vmap(grad(self.flat_loss))(rows, self.query)

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(pair):
            x, y = pair
            return x.to(dtype), y.to(dtype) if y.is_floating_point() else y

        params = {name: t.detach().to(dtype) for name, t in self.params.items()}
        return Problem(self.loss, params, cast(self.support), cast(self.query), Layout(params))


def regression(tasks: int = 4, device: str | torch.device = "cpu") -> Problem:
    """A tanh network on random data, float64, D = 25."""
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(device, torch.float64)

    def data() -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, 10, 2, dtype=torch.float64)
        return x.to(device), torch.randn(tasks, 10, 1, dtype=torch.float64).to(device)

    params = {name: t.detach() for name, t in model.named_parameters()}
    return Problem(
        module_loss(model, nn.functional.mse_loss), params, data(), data(), Layout(params)
    )


def classification(tasks: int = 4, device: str | torch.device = "cpu") -> Problem:
    """A tanh network with cross-entropy loss, float64; for the Gauss-Newton matrix."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(device, torch.float64)

    def data() -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, 8, 3, dtype=torch.float64)
        return x.to(device), torch.randint(4, (tasks, 8)).to(device)

    params = {name: t.detach() for name, t in model.named_parameters()}
    return Problem(
        module_loss(model, nn.functional.cross_entropy), params, data(), data(), Layout(params)
    )


def outputs(problem: Problem, row: Tensor, x: Tensor) -> Tensor:
    return functional_call(problem.loss.model, problem.layout.unflatten(row), (x,))
