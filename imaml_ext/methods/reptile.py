"""Reptile: the displacement by the inner steps is the gradient."""

from collections.abc import Mapping
from itertools import cycle

import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.meta_gradient import MetaGradient, Nonfinite, relative_weights
from imaml_ext.methods.shared import direct_gradient
from imaml_ext.methods.unrolled import Derivatives, Unrolled
from imaml_ext.problem.layout import Params
from imaml_ext.problem.objective import Loss, Objective, check_same_tasks
from imaml_ext.solvers.inner import Adam, GradientDescent
from imaml_ext.solvers.inner.tensor_steps import State


class Reptile(Unrolled):
    """The mean of `theta - phi_i`, where phi_i takes steps on the support and query sets in turn.

    Reptile needs steps on different examples of a task: with the same ones in every step, its
    gradient is that of joint training, which does not learn to adapt. So the first, third, ... step
    uses the support set, or its next mini-batch, and the others use the query set. Evaluation
    adapts to the support set only, as with every method.

    Args:
        loss, params, nonfinite: as in `MAML`.
        inner: as in `MAML`; at least 2 steps, of constant sizes: Reptile differentiates nothing.
        shared: learned, but not adapted, as in `MAML`. Their gradient is the mean of the losses'
            gradients at the K points where the steps start. This is the limit, as lr tends to 0, of
            `(psi - psi_K) / (K lr)` for shared parameters psi that take K steps of size lr as well.

    Raises:
        TypeError, ValueError: as in `MAML`, `inner` takes fewer than 2 steps, or its step size
            requires grad.

    Source: Nichol, Achiam, Schulman 2018, "On first-order meta-learning algorithms".
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | Adam | None = None,
        shared: Mapping[str, Tensor] | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(loss, params, inner=inner, shared=shared, nonfinite=nonfinite)
        if self.inner.steps < 2:
            raise ValueError(
                "Reptile needs an inner solver of at least 2 steps, one on the support set and one "
                f"on the query set, got steps={self.inner.steps}"
            )
        if self.hyperparameters():
            raise ValueError(
                "lr requires grad, but Reptile cannot learn it: call requires_grad_(False) on the "
                "StepSize, or learn it by MAML"
            )

    @torch.no_grad()
    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        batch = TaskBatch.of(batch)
        query_objective = Objective(
            self.query_loss, self.layout, batch.query, "query", self._constants()
        )
        problem = self._problem(batch.support)
        check_same_tasks(problem.objective, query_objective)
        weights = relative_weights(batch.weights, problem.tasks, problem.theta)
        turns = cycle((problem, self._problem(batch.query)))
        theta = problem.start()
        given = self._given(problem, theta, {})
        phi, state, visited = theta, State(), []
        for step in range(self.inner.steps):
            objective = next(turns).objective_at(step // 2)
            if self.shared:
                visited.append((objective, phi))
            phi, state = self._step(objective, step, phi, state, given)
        support = problem.objective.gradient(phi)
        losses = query_objective.losses(phi)
        change = theta - phi if weights is None else weights[:, None] * (theta - phi)
        found = Derivatives(phi, losses, losses, {"theta": change}, {})

        def shared(ok: Tensor) -> Params:
            each = [direct_gradient(objective, at, ok, weights) for objective, at in visited]
            sums = (sum(parts) for parts in zip(*each, strict=True))
            return {
                name: total / len(visited) for name, total in zip(self.shared, sums, strict=True)
            }

        return self._mean(problem, found, support, shared, weights)
