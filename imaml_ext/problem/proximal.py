"""The inner problems of a batch of tasks: a loss each, and the proximal term."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.ops.rows import prox_norms, row_dot
from imaml_ext.problem.lam import is_positive, matrix_product
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective


class Proximal:
    """`G_i(phi) = L_i(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, called G below, for B tasks.

    Args:
        objective: the losses L_i on the support sets.
        theta: where the tasks start, and what Λ pulls them to, [D].
        lam: Λ: [1] for a scalar, [D] for a diagonal, [D, D] dense.

    Attributes:
        objective, theta, lam: as given.
        fused: what of Λ the kernels add by themselves, [1] or [D]: all but a dense one.
    """

    def __init__(self, objective: Objective, theta: Tensor, lam: Tensor) -> None:
        self.objective = objective
        self.theta = theta
        self.lam = lam
        self.fused = lam if lam.dim() == 1 else lam.new_zeros(1)

    @property
    def tasks(self) -> int:
        """B."""
        return self.objective.tasks

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters: `unflatten` makes {name: [B, ...]} of phi [B, D]."""
        return self.objective.layout

    def start(self) -> Tensor:
        """theta for every task, [B, D], to be written."""
        return self.theta.expand(self.tasks, -1).clone()

    def one_by_one(self) -> Iterator["Proximal"]:
        """The B inner problems, each as a batch of one: for solvers that know a single vector."""
        for i in range(self.tasks):
            data = pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], self.objective.data)
            one = Objective(self.objective.loss, self.layout, data, shared=self.objective.shared)
            yield Proximal(one, self.theta, self.lam)

    def values(self, phi: Tensor) -> Tensor:
        """G at phi [B, D]; [B] float64."""
        with torch.no_grad():
            displacement = phi - self.theta
            return self.objective.losses(phi) + 0.5 * row_dot(
                displacement, self.strengthen(displacement)
            )

    def value_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G [B] float64 and ∇G [B, D] at phi [B, D]."""
        return self.complete(phi, *self.objective.gradient(phi))

    def complete(self, phi: Tensor, losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """G [B] float64 and ∇G [B, D] from the losses [B] and their gradients [B, D] at phi."""
        with torch.no_grad():
            displacement = phi - self.theta
            pull = self.strengthen(displacement)
            return losses + 0.5 * row_dot(displacement, pull), gradient + pull

    def unfused(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """∇L and, for a dense Λ, `Λ (phi - theta)`: what the kernels do not add by themselves."""
        return gradient if self.lam.dim() == 1 else gradient + self.strengthen(phi - self.theta)

    def residual(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """`‖∇G‖` [B] float64, from ∇L at phi."""
        norm2, _ = prox_norms(phi, self.unfused(phi, gradient), self.theta, self.fused)
        return norm2.sqrt()

    def strengthen(self, rows: Tensor) -> Tensor:
        """`Λ rows_i` of every row, [B, D]."""
        return rows * self.lam if self.lam.dim() == 1 else matrix_product(rows, self.lam)

    def is_usable(self) -> Tensor:
        """Whether Λ is finite and positive definite: one bool, still on the device."""
        return is_positive(self.lam)
