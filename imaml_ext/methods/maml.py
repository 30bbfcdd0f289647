"""The methods that the paper compares with: MAML, its first-order variants, and Reptile.

The inner steps act on the [B, D] rows of all tasks, and the derivatives of the tasks' query losses,
each with respect to its own row of theta, are one backward pass.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from imaml_ext._checks import check_choice, check_integer, kind_of
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import (
    MetaGradient,
    Nonfinite,
    failed_tasks,
    relative_weights,
    task_weight,
)
from imaml_ext.problem.differentiation import check_inference_mode
from imaml_ext.problem.lam import Lam, flatten_lam
from imaml_ext.problem.layout import Params
from imaml_ext.problem.objective import Loss, Objective, check_same_tasks
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import GradientDescent
from imaml_ext.solvers.inner.base import new_status, update_status
from imaml_ext.solvers.solution import Solution, Status


class _Unrolled(Method):
    """Gradient descent whose last `last` steps are differentiated (None: all)."""

    last: int | None = None

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | None = None,
        lam: Lam | None = None,
        learn_lr: bool = False,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(loss, params, query_loss=query_loss, nonfinite=nonfinite)
        self.inner = _checked(inner)
        self.lam = lam
        if lam is not None and flatten_lam(self.layout, lam).requires_grad:
            raise ValueError("lam requires grad, but only IMAML learns it: detach it")
        self.log_lr = None
        check_choice("learn_lr", learn_lr, (False, True))
        if learn_lr:
            if self.inner.steps == 0:
                raise ValueError("learn_lr needs an inner solver of at least 1 step, got steps=0")
            layout = self.layout
            lr = torch.full((), self.inner.lr, dtype=layout.dtype, device=layout.device)
            self.log_lr = lr.log().requires_grad_()

    def hyperparameters(self) -> Params:
        return {} if self.log_lr is None else {"log_lr": self.log_lr}

    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        batch = TaskBatch.of(batch)
        query_objective = Objective(self.query_loss, self.layout, batch.query, "query")
        problem = self._problem(batch.support)
        check_same_tasks(problem.objective, query_objective)
        check_inference_mode()
        last = self.inner.steps if self.last is None else min(self.last, self.inner.steps)
        with torch.enable_grad():
            theta = problem.start().requires_grad_()  # one row per task
            log_lr = None
            if self.log_lr is not None:  # one per task, so that a failed task can be omitted
                log_lr = self.log_lr.detach().expand(problem.tasks, 1).clone().requires_grad_()
            lr = self.inner.lr if log_lr is None else log_lr.exp()
            with torch.no_grad():
                before, velocity = self._descend(
                    problem, theta, theta, None, lr, self.inner.steps - last
                )
            # Without lam, the derivative of the earlier steps is taken to be the identity, else 0.
            whole = last == self.inner.steps
            carried = theta if whole or self.lam is None else theta.detach()
            start = before.detach() + (carried - theta.detach())
            phi, _ = self._descend(problem, start, theta, velocity, lr, last)
            losses = query_objective.losses(phi)
            query_objective.check_inputs(losses, phi)
            leaves = [theta] if log_lr is None else [theta, log_lr]
            with problem.objective.computing():
                gradients = torch.autograd.grad(
                    losses.sum(), leaves, allow_unused=True, materialize_grads=True
                )
        phi = phi.detach()
        support = problem.objective.gradient(phi)
        return self._mean(problem, phi, support, losses.detach(), *gradients, weights=batch.weights)

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        problem = self._problem(support, check=False)
        lr = self.inner.lr if self.log_lr is None else self.log_lr.exp()
        theta = problem.start()
        phi, _ = self._descend(problem, theta, theta, None, lr, self.inner.steps)
        return self.layout.unflatten(phi)

    def _problem(self, support: Any, *, check: bool = True) -> Proximal:
        objective = Objective(self.loss, self.layout, support, "support", check=check)
        theta = self.layout.flatten(self.params).detach()
        lam = theta.new_zeros(1) if self.lam is None else flatten_lam(self.layout, self.lam)
        return Proximal(objective, theta, lam)

    def _descend(
        self,
        problem: Proximal,
        phi: Tensor,
        theta: Tensor,
        velocity: Tensor | None,
        lr: float | Tensor,
        steps: int,
    ) -> tuple[Tensor, Tensor | None]:
        """phi and velocity after `steps` steps; in the graph of phi, theta and lr in grad mode."""
        momentum, nesterov = self.inner.momentum, self.inner.nesterov
        for _ in range(steps):
            gradient = problem.objective.differentiable_gradient(phi)
            if self.lam is not None:
                gradient = gradient + problem.lam.mv(phi - theta)
            if momentum:
                velocity = gradient if velocity is None else momentum * velocity + gradient
                gradient = gradient + momentum * velocity if nesterov else velocity
            phi = phi - lr * gradient
        return phi, velocity

    def _mean(
        self,
        problem: Proximal,
        phi: Tensor,  # [B, D]
        support: tuple[Tensor, Tensor],  # losses [B] and their gradients [B, D], at phi
        query_loss: Tensor,  # [B]
        *gradients: Tensor,  # of each task, by theta [B, D] and by each hyperparameter [B, 1]
        weights: Tensor | None,  # of the tasks, [B]
    ) -> MetaGradient:
        """The mean over the tasks, with a report."""
        layout, (support_loss, support_gradient) = problem.layout, support
        finite = torch.cat([t.isfinite() for t in (support_loss[:, None], *gradients)], 1).all(1)
        residual = torch.where(finite, problem.residual(phi, support_gradient), torch.nan)
        status = torch.full_like(new_status(problem), Status.MAX_ITER)
        status = update_status(status, residual, None)
        inner = Solution(phi, status, torch.full_like(status, self.inner.steps), residual)
        ok = ~failed_tasks(query_loss, inner)
        shares = relative_weights(weights, problem.tasks, phi)
        weight = task_weight(ok, self.nonfinite, layout.dtype, shares)
        if shares is not None:
            weight = weight * shares[:, None]
        # Weights before the sum, which may overflow where the mean does not.
        means = [(torch.where(ok[:, None], rows, 0.0) * weight).sum(0) for rows in gradients]
        learned = zip(self.hyperparameters(), means[1:], strict=True)
        return MetaGradient(
            params=layout.unflatten(means[0]),
            lam=None,
            support_loss=support_loss,
            query_loss=query_loss,
            adapted=layout.unflatten(phi),
            inner=inner,
            linear=None,
            hyperparameters={name: mean[0] for name, mean in learned},
            weights=shares,
        )


def _checked(inner: GradientDescent | None) -> GradientDescent:
    """The inner solver of an unrolled method, which calls none but only reads its settings.

    Raises:
        TypeError, ValueError: the solver takes other steps than gradient descent, or has a `tol`.
    """
    inner = GradientDescent() if inner is None else inner
    if getattr(type(inner), "solve", None) is not GradientDescent.solve:
        raise TypeError(
            "inner must be an instance of GradientDescent, whose steps are differentiated, got "
            f"{kind_of(inner)}: IMAML takes any inner solver"
        )
    if inner.tol is not None:
        raise ValueError("inner must have no tol: a differentiated solver takes all steps")
    return inner


class MAML(_Unrolled):
    """Model-agnostic meta-learning: back-propagation through every step of the adaptation.

    Memory grows with the number of steps, whose graphs are all kept.

    Args:
        loss, params, query_loss, nonfinite: as in `Method`.
        inner: gradient descent, plain or with momentum, without `tol`.
        accelerated: Nesterov's method for a lam-strongly convex G, `GradientDescent.accelerated`;
            needs lam as a float.
        lam: adds the proximal term to the inner objective, as in iMAML; None: no such term.
        learn_lr: learn the step size too, as `log_lr`, initially that of `inner`.

    Raises:
        TypeError: `inner` is another solver; or as in `Method`.
        ValueError: `inner` has a `tol`, or `lam` requires grad; or as in `Method`.

    Source: Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning".
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | None = None,
        accelerated: bool = False,
        lam: Lam | None = None,
        learn_lr: bool = False,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        check_choice("accelerated", accelerated, (False, True))
        if accelerated:
            inner = _checked(inner)
            if not isinstance(lam, (int, float)):
                raise ValueError("accelerated needs lam as a float, to compute the momentum")
            if inner.momentum:
                raise ValueError(
                    f"accelerated sets the momentum: inner must have 0, got {inner.momentum}"
                )
            inner = GradientDescent.accelerated(
                lr=inner.lr, steps=inner.steps, strong_convexity=lam
            )
        super().__init__(
            loss, params, inner=inner, lam=lam, learn_lr=learn_lr, query_loss=query_loss,
            nonfinite=nonfinite,
        )  # fmt: skip


class TruncatedMAML(_Unrolled):
    """MAML that back-propagates through the last `last` steps only.

    With lam, theta enters through the proximal terms of those steps, and the result of the steps
    before them is a constant (Shaban et al. 2019). Without lam, the derivative of the earlier steps
    is taken to be the identity: `last=0` is first-order MAML.

    Args:
        loss, params: as in `MAML`.
        last: number of steps that are differentiated.
        settings: inner, lam, learn_lr, query_loss and nonfinite, as in `MAML`.

    Raises:
        TypeError, ValueError: last is not an integer, negative, or 0 with `lam` or `learn_lr`; or
            as in `MAML`.

    Source: Shaban, Cheng, Hatch, Boots 2019, "Truncated back-propagation for bilevel optimization".
    """

    def __init__(
        self, loss: Loss, params: Mapping[str, Tensor], *, last: int, **settings: Any
    ) -> None:
        check_integer("last", last, minimum=0)
        super().__init__(loss, params, **settings)
        if last == 0 and (self.lam is not None or self.log_lr is not None):
            raise ValueError("with lam or learn_lr, last must be at least 1, got 0")
        self.last = last


class FOMAML(_Unrolled):
    """First-order MAML: the query gradient at phi, as if phi - theta did not depend on theta.

    Args:
        loss, params, inner, query_loss, nonfinite: as in `MAML`.

    Raises:
        TypeError, ValueError: as in `MAML`.

    Source: Finn, Abbeel, Levine 2017, section 5.2.
    """

    last = 0

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | None = None,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(loss, params, inner=inner, query_loss=query_loss, nonfinite=nonfinite)


class Reptile(_Unrolled):
    """`theta - phi_i` as the gradient, after steps on the support and the query set in turn.

    Reptile needs steps on different examples of a task: with the same ones in every step, its
    gradient is that of joint training, which does not learn to adapt. So the support set is the
    mini-batch of the first, third, ... step, and the query set that of the others. Evaluation
    adapts to the support set only, as with every method.

    Args:
        loss, params, nonfinite: as in `MAML`.
        inner: as in `MAML`; at least 2 steps.

    Raises:
        TypeError, ValueError: as in `MAML`, or `inner` takes fewer than 2 steps.

    Source: Nichol, Achiam, Schulman 2018, "On first-order meta-learning algorithms".
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(loss, params, inner=inner, nonfinite=nonfinite)
        if self.inner.steps < 2:
            raise ValueError(
                "Reptile needs an inner solver of at least 2 steps, one on the support set and one "
                f"on the query set, got steps={self.inner.steps}"
            )

    @torch.no_grad()
    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        batch = TaskBatch.of(batch)
        query_objective = Objective(self.query_loss, self.layout, batch.query, "query")
        problem = self._problem(batch.support)
        check_same_tasks(problem.objective, query_objective)
        turns = cycle((problem, self._problem(batch.query)))
        theta, phi, velocity = problem.theta, problem.start(), None
        for _ in range(self.inner.steps):
            phi, velocity = self._descend(next(turns), phi, theta, velocity, self.inner.lr, 1)
        support = problem.objective.gradient(phi)
        losses = query_objective.losses(phi)
        return self._mean(problem, phi, support, losses, theta - phi, weights=batch.weights)
