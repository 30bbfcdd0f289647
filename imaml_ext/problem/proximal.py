"""The inner problems of a batch of tasks: a loss for each, and the proximal term."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.data.mini_batches import MiniBatches
from imaml_ext.ops.rows import prox_norms, row_dot
from imaml_ext.problem.differentiation import check_no_transform
from imaml_ext.problem.lam_operator import LamOperator
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective


class Proximal:
    """`G_i(phi) = L_i(phi) + 1/2 (phi - theta)' Λ_i (phi - theta)`, called G below, for B tasks.

    Args:
        objective: the losses L_i on the support sets.
        theta: initial point of every task and centre of the proximal term, [D].
        lam: Λ: [1] for a scalar, [D] for a diagonal, [D, D] for a dense matrix; [B, 1, 1] or
            [B, 1, D] for a scalar or a diagonal per task.
        start: initial phi of each task, [B, D]; None: theta.
        batches: mini-batches for the steps of an inner solver; None: all examples in each step.

    Attributes:
        objective, theta, batches: as given.
        lam: Λ as a `LamOperator`: `lam.mv(rows)` is `Λ_i rows_i`, and `lam.values` the tensor.

    Raises:
        ValueError: lam is for another number of tasks.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        lam: Tensor,
        *,
        start: Tensor | None = None,
        batches: MiniBatches | None = None,
    ) -> None:
        self.objective = objective
        self.theta = theta
        if lam.dim() == 3 and len(lam) != objective.tasks:
            raise ValueError(
                f"lam has values for {len(lam)} tasks, but the batch has {objective.tasks}: pass "
                "one for each task; a diagonal for all tasks is a dict of tensors of the "
                "parameters' shapes"
            )
        self.lam = LamOperator.of(lam)
        self.batches = batches
        self._start = start

    @property
    def tasks(self) -> int:
        """B."""
        return self.objective.tasks

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters: `unflatten` maps phi [B, D] to {name: [B, ...]}."""
        return self.objective.layout

    def start(self) -> Tensor:
        """The initial phi of every task, [B, D], a copy: theta unless another was given."""
        return (self.theta.expand(self.tasks, -1) if self._start is None else self._start).clone()

    def objective_at(self, step: int) -> Objective:
        """The losses L_i for a step, counted from 0: on its mini-batch if there are mini-batches.

        Raises:
            TypeError, ValueError: the mini-batch is invalid, or has another number of tasks.
        """
        if self.batches is None:
            return self.objective
        data = self.batches.at(step)
        objective = self.objective.of_tasks(data, self.objective.shared, check=step == 0)
        if self.objective.recorded is None:
            objective.recorded = None
        if objective.tasks != self.tasks:
            raise ValueError(
                f"mini-batch {step} has {objective.tasks} tasks, and its data {self.tasks}"
            )
        return objective

    def one_by_one(self) -> Iterator["Proximal"]:
        """The B inner problems, each as a batch of one: for solvers of a single vector."""
        for i in range(self.tasks):
            row = slice(i, i + 1)
            data = pytree.tree_map(lambda leaf, row=row: leaf[row], self.objective.data)
            one = Objective(self.objective.loss, self.layout, data, shared=self.objective.shared)
            yield Proximal(
                one, self.theta, self.lam.of_task(i),
                start=None if self._start is None else self._start[row],
                batches=None if self.batches is None else self.batches.rows(row),
            )  # fmt: skip

    def with_lam(self, lam: Tensor) -> "Proximal":
        """The problem with another Λ, given as the constructor's."""
        return self._with(self.objective, lam)

    def with_objective(self, objective: Objective) -> "Proximal":
        """The problem with other losses of the same tasks."""
        return self._with(objective, self.lam.values)

    def copy(self) -> "Proximal":
        """The problem with copies of theta and Λ, for functions that may write to them."""
        copied = self.with_lam(self.lam.values.clone())
        copied.theta = self.theta.clone()
        return copied

    def _with(self, objective: Objective, lam: Tensor) -> "Proximal":
        return Proximal(objective, self.theta, lam, start=self._start, batches=self.batches)

    def values(self, phi: Tensor) -> Tensor:
        """G at phi [B, D]; [B] float64. Differentiable, if phi requires grad, in grad mode."""
        check_no_transform()
        phi = self._checked(phi)
        displacement = phi - self.theta
        pull = self.lam.mv(displacement)
        if phi.requires_grad and torch.is_grad_enabled():
            losses = self.objective.losses(phi, recorded=False)
            return losses + 0.5 * (displacement * pull).sum(1, dtype=torch.float64)
        return self.objective.losses(phi) + 0.5 * row_dot(displacement, pull)

    def value_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G [B] float64 and ∇G [B, D] at phi [B, D], without a graph."""
        phi = self._checked(phi).detach()
        return self.add_proximal(phi, *self.objective.gradient(phi))

    def _checked(self, phi: Tensor) -> Tensor:
        shape = (self.tasks, self.layout.dim)
        if phi.shape != shape:
            raise ValueError(f"phi must be {list(shape)}, got {list(phi.shape)}")
        return phi.contiguous()

    def add_proximal(self, phi: Tensor, losses: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """G [B] float64 and ∇G [B, D] from the losses [B] and their gradients [B, D] at phi."""
        with torch.no_grad():
            displacement = phi - self.theta
            pull = self.lam.mv(displacement)
            return losses + 0.5 * row_dot(displacement, pull), gradient + pull

    def descend(self, phi: Tensor, **settings: Any) -> bool:
        """Take all steps of gradient descent from phi [B, D], in place, if one call can.

        Args:
            settings: `steps`, and lr, velocity, momentum and nesterov as in `prox_gd_`.
        """
        recorded = self.objective.recorded
        if recorded is None or not self.lam.is_fused or self.batches is not None:
            return False
        return recorded.descend(phi, theta=self.theta, lam=self.lam.fused, **settings)

    def unfused(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """From ∇L at phi, [B, D], the gradient to which the fused kernels add the rest of ∇G."""
        return self.lam.add_unfused(gradient, phi, self.theta)

    def residual(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """`‖∇G‖` [B] float64, from ∇L at phi."""
        norm2, _ = prox_norms(phi, self.unfused(phi, gradient), self.theta, self.lam.fused)
        return norm2.sqrt()
