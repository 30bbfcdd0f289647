"""The methods that the paper compares with: back-propagation through the inner steps, or none.

All tasks of a batch at once: the inner steps act on [B, D] rows, and the derivative of each task's
query loss by its own row of theta is one backward pass for the whole batch.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from imaml_ext._checks import check_integer
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import MetaGradient, Nonfinite, failed_tasks, task_share
from imaml_ext.problem.lam import Lam, flatten_lam
from imaml_ext.problem.layout import Params
from imaml_ext.problem.objective import Loss, Objective, check_recording
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import GradientDescent
from imaml_ext.solvers.inner.base import new_status, update_status
from imaml_ext.solvers.solution import Solution, Status


class _Unrolled(Method):
    """A few steps of gradient descent, of which the last `last` are differentiated (None: all)."""

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
        self.inner = GradientDescent() if inner is None else inner
        if self.inner.tol is not None:
            raise ValueError(
                "a solver that is differentiated takes a fixed number of steps: no tol"
            )
        self.lam = lam
        if lam is not None and flatten_lam(self.layout, lam).requires_grad:
            raise ValueError("lam is not learned here: detach it, or use IMAML")
        self.log_lr = None
        if learn_lr:
            layout = self.layout
            lr = torch.full((), self.inner.lr, dtype=layout.dtype, device=layout.device)
            self.log_lr = lr.log().requires_grad_()

    def extra(self) -> Params:
        return {} if self.log_lr is None else {"log_lr": self.log_lr}

    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        judged = Objective(self.query_loss, self.layout, batch.query, "query")
        problem = self._problem(batch.support, judged.tasks)
        check_recording()
        last = self.inner.steps if self.last is None else min(self.last, self.inner.steps)
        with torch.enable_grad():
            theta = problem.start().requires_grad_()  # a row of its own for each task
            log_lr = None
            if self.log_lr is not None:  # for each task too, so that a failed one can be left out
                log_lr = self.log_lr.detach().expand(problem.tasks, 1).clone().requires_grad_()
            lr = self.inner.lr if log_lr is None else log_lr.exp()
            with torch.no_grad():
                before, velocity = self._descend(
                    problem, theta, theta, None, lr, self.inner.steps - last
                )
            # Steps that are left out pass the derivative on as it is, or are a constant.
            whole = last == self.inner.steps
            carried = theta if whole or self.lam is None else theta.detach()
            start = before.detach() + (carried - theta.detach())
            phi, _ = self._descend(problem, start, theta, velocity, lr, last)
            losses = judged.losses(phi)
            leaves = [theta] if log_lr is None else [theta, log_lr]
            with problem.objective.computing(phi):
                gradients = torch.autograd.grad(
                    losses.sum(), leaves, allow_unused=True, materialize_grads=True
                )
        finite = torch.cat([rows.isfinite() for rows in gradients], dim=1).all(1)
        support_loss, inner = _report(problem, phi.detach(), self.inner.steps, finite)
        ok = ~failed_tasks(losses.detach(), inner)
        share = task_share(ok, self.nonfinite, self.layout.dtype)
        # Shares before the sum, which may overflow where the mean does not.
        means = [(torch.where(ok[:, None], rows, 0.0) * share).sum(0) for rows in gradients]
        return MetaGradient(
            params=self.layout.unflatten(means[0]),
            lam=None,
            support_loss=support_loss,
            query_loss=losses.detach(),
            adapted=self.layout.unflatten(phi.detach()),
            inner=inner,
            linear=None,
            extra={} if log_lr is None else {"log_lr": means[1][0]},
        )

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        problem = self._problem(support)
        lr = self.inner.lr if self.log_lr is None else self.log_lr.exp()
        theta = problem.start()
        phi, _ = self._descend(problem, theta, theta, None, lr, self.inner.steps)
        return self.layout.unflatten(phi)

    def _problem(self, support: Any, tasks: int | None = None) -> Proximal:
        objective = Objective(self.loss, self.layout, support, "support")
        if tasks is not None and objective.tasks != tasks:
            raise ValueError(
                f"support holds {objective.tasks} tasks, query {tasks}: B must be the same"
            )
        theta = self.layout.flatten(self.params).detach()
        lam = (
            theta.new_zeros(1) if self.lam is None else flatten_lam(self.layout, self.lam).detach()
        )
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
        """phi and velocity after `steps` steps, in the graph of phi, theta and lr if it records."""
        momentum, nesterov = self.inner.momentum, self.inner.nesterov
        for _ in range(steps):
            gradient = problem.objective.differentiable_gradient(phi)
            if self.lam is not None:
                gradient = gradient + problem.strengthen(phi - theta)
            if momentum:
                velocity = gradient if velocity is None else momentum * velocity + gradient
                gradient = gradient + momentum * velocity if nesterov else velocity
            phi = phi - lr * gradient
        return phi, velocity


class MAML(_Unrolled):
    """Model-agnostic meta-learning: back-propagation through every step of the adaptation.

    Memory grows with the number of steps: the graph of each is kept.

    Args:
        loss, params, query_loss, nonfinite: as in `Method`.
        inner: gradient descent, plain or with momentum, without `tol`.
        accelerated: take Nesterov's steps with the momentum for a G that is lam-strongly convex:
            `GradientDescent.accelerated`. Needs lam as a float.
        lam: adds the proximal term to the objective that is descended, as in iMAML; None: without.
        learn_lr: learn the step size too, as `log_lr`, beginning with that of `inner`.

    Raises:
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
        if accelerated:
            inner = GradientDescent() if inner is None else inner
            if not isinstance(lam, (int, float)):
                raise ValueError(
                    "accelerated needs lam as a float: its momentum follows from lr and lam"
                )
            if inner.momentum:
                raise ValueError("accelerated sets the momentum: leave that of inner at 0")
            inner = GradientDescent.accelerated(
                lr=inner.lr, steps=inner.steps, strong_convexity=lam, tol=inner.tol
            )
        super().__init__(
            loss, params, inner=inner, lam=lam, learn_lr=learn_lr, query_loss=query_loss,
            nonfinite=nonfinite,
        )  # fmt: skip


class TruncatedMAML(_Unrolled):
    """MAML that back-propagates through the last `last` steps alone.

    With lam, theta is seen by the proximal terms of those steps, and what came before them is a
    constant (Shaban et al. 2019). Without, there is nothing else that sees theta, so the steps
    before count as the identity: `last=0` is first-order MAML.

    Args:
        loss, params: as in `MAML`.
        last: steps that are differentiated.
        settings: inner, lam, learn_lr, query_loss and nonfinite, as in `MAML`.

    Raises:
        ValueError: last is negative, or 0 with `lam` or `learn_lr`; or as in `MAML`.

    Source: Shaban, Cheng, Hatch, Boots 2019, "Truncated back-propagation for bilevel optimization".
    """

    def __init__(
        self, loss: Loss, params: Mapping[str, Tensor], *, last: int, **settings: Any
    ) -> None:
        check_integer("last", last)
        if last < 0:
            raise ValueError(f"last must not be negative, got {last}")
        super().__init__(loss, params, **settings)
        if last == 0 and (self.lam is not None or self.log_lr is not None):
            raise ValueError(
                "with lam or learn_lr, last must be at least 1: its steps alone see theta or lr"
            )
        self.last = last


class _FirstOrder(_Unrolled):
    """No step is differentiated."""

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


class FOMAML(_FirstOrder):
    """First-order MAML: the query gradient at phi, as if phi - theta did not depend on theta.

    Args:
        loss, params, inner, query_loss, nonfinite: as in `MAML`.

    Raises:
        ValueError: as in `MAML`.

    Source: Finn, Abbeel, Levine 2017, section 5.2.
    """


class Reptile(_FirstOrder):
    """`theta - phi_i` as the gradient, phi descended to on the support and query sets in turn.

    Reptile does not split a task, but it needs steps on different examples: on the same ones all
    the way its gradient is that of joint training, in which nothing is learned about adapting. The
    support set is the mini-batch of the first, third, ... step, the query set that of the others.
    Evaluation adapts to the support set alone, as every method.

    Args:
        loss, params, inner, query_loss, nonfinite: as in `MAML`.

    Raises:
        ValueError: as in `MAML`.

    Source: Nichol, Achiam, Schulman 2018, "On first-order meta-learning algorithms".
    """

    @torch.no_grad()
    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        judged = Objective(self.query_loss, self.layout, batch.query, "query")
        problem = self._problem(batch.support, judged.tasks)
        turns = cycle((problem, self._problem(batch.query)))
        theta, phi, velocity = problem.theta, problem.start(), None
        for _ in range(self.inner.steps):
            phi, velocity = self._descend(next(turns), phi, theta, velocity, self.inner.lr, 1)
        finite = phi.isfinite().all(1)
        support_loss, inner = _report(problem, phi, self.inner.steps, finite)
        losses = judged.losses(phi)
        ok = ~failed_tasks(losses, inner)
        share = task_share(ok, self.nonfinite, self.layout.dtype)
        displacement = torch.where(ok[:, None], theta - phi, 0.0) * share
        return MetaGradient(
            params=self.layout.unflatten(displacement.sum(0)),
            lam=None,
            support_loss=support_loss,
            query_loss=losses,
            adapted=self.layout.unflatten(phi),
            inner=inner,
            linear=None,
        )


def _report(problem: Proximal, phi: Tensor, steps: int, finite: Tensor) -> tuple[Tensor, Solution]:
    """Support losses at phi, and how far from an optimum of G it is.

    Args:
        finite: tasks whose meta-gradient is finite, [B] bool.
    """
    losses, gradient = problem.objective.gradient(phi)
    residual = problem.residual(phi, gradient)
    residual = torch.where(losses.isfinite() & finite, residual, torch.nan)
    status = update_status(torch.full_like(new_status(problem), Status.MAX_ITER), residual, None)
    return losses, Solution(phi, status, torch.full_like(status, steps), residual)
