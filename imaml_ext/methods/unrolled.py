"""Methods that unroll the inner solver: the inner steps, and the backward pass through them.

The inner steps act on the [B, D] rows of all tasks, and the derivatives of the tasks' query losses
are one backward pass. theta and the hyper-parameters enter it with one row per task, so that failed
tasks can be omitted from the mean; shared parameters, which may be large, enter it once for all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imaml_ext._checks import check_choice, kind_of
from imaml_ext._tracing import may_read_values
from imaml_ext.data.mini_batches import rows_of_tasks, split_batches
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method, check_learned
from imaml_ext.methods.learned_lam import (
    check_distinct,
    lam_value,
    learned_lam,
    strength_gradients,
)
from imaml_ext.methods.meta_gradient import (
    MetaGradient,
    Nonfinite,
    failed_tasks,
    relative_weights,
    task_weight,
)
from imaml_ext.methods.shared import all_finite, check_shared, replacement
from imaml_ext.methods.step_weights import StepWeights, check_step_weights, check_values
from imaml_ext.problem.differentiation import check_inference_mode
from imaml_ext.problem.lam import Lam, ProximalStrength, flatten_lam, unflatten_lam_gradient
from imaml_ext.problem.lam_operator import product
from imaml_ext.problem.layout import Params
from imaml_ext.problem.objective import Loss, Objective, check_same_tasks
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import Adam, GradientDescent, StepSize
from imaml_ext.solvers.inner.base import new_status, update_status
from imaml_ext.solvers.inner.tensor_steps import State
from imaml_ext.solvers.solution import Solution, Status

_LAM = "lam"  # the name of the rows of Λ, whatever its form


class Given(NamedTuple):
    """What the inner steps depend on, besides the losses."""

    theta: Tensor  # [B, D]
    rates: Sequence[float | Tensor]  # of each step; a tensor is [B, D], where B or D may be 1
    pull: Callable[[Tensor], Tensor] | None  # Λ times a displacement [B, D]


class Derivatives(NamedTuple):
    """The query losses of a batch and their derivatives."""

    phi: Tensor  # [B, D]
    query_loss: Tensor  # [B], at phi
    value: Tensor  # [B], what is differentiated: the query loss, or the weighted sum over steps
    rows: Params  # with respect to theta, Λ and the step sizes, [B, ...] each
    shared: Params  # with respect to the shared parameters, summed over the tasks


class Unrolled(Method):
    """Inner steps whose last `last` are differentiated (None: all)."""

    last: int | None = None
    first_order = False  # whether the gradients in the inner steps are treated as constants

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        inner: GradientDescent | Adam | None = None,
        lam: Lam | ProximalStrength | None = None,
        learn_lr: bool = False,
        shared: Mapping[str, Tensor] | None = None,
        step_weights: StepWeights | None = None,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(loss, params, query_loss=query_loss, nonfinite=nonfinite)
        self.inner = checked(inner)
        self.lam = lam
        values = flatten_lam(self.layout, lam_value(lam))
        if values.dim() == 3 and values.requires_grad:
            raise ValueError("only IMAML learns a lam per task: detach lam, or use IMAML")
        check_choice("learn_lr", learn_lr, (False, True))
        if learn_lr:
            if isinstance(self.inner.lr, StepSize):
                raise ValueError(
                    "learn_lr=True needs an inner solver whose lr is a number, got a StepSize: "
                    "remove learn_lr"
                )
            self.inner = replace(self.inner, lr=StepSize(self.params, self.inner.lr))
        if isinstance(self.inner.lr, StepSize):
            self.inner.lr.check(self.layout, self.inner.steps)
        if self._step_sizes() and self.inner.steps == 0:
            raise ValueError("learn_lr needs an inner solver of at least 1 step, got steps=0")
        check_shared(shared, self.layout, self.loss, self.query_loss)
        self.shared = dict(shared or {})
        check_learned("shared", self.shared)
        check_distinct(self.learned())
        self.step_weights = step_weights
        if step_weights is not None:
            check_step_weights(step_weights, self.layout, self.inner.steps)
        self._meta_step = torch.zeros((), dtype=torch.int64, device=self.layout.device)

    def hyperparameters(self) -> Params:
        return learned_lam(self.lam) | self._step_sizes()

    def at_step(self, step: int | Tensor) -> None:
        if isinstance(step, Tensor):
            self._meta_step.copy_(step)
        else:
            self._meta_step.fill_(step)

    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        batch = TaskBatch.of(batch)
        problem = self._problem(batch.support)
        query = Objective(self.query_loss, self.layout, batch.query, "query", self._constants())
        check_same_tasks(problem.objective, query)
        check_inference_mode()
        weights = relative_weights(batch.weights, problem.tasks, problem.theta)
        found = self._differentiate(problem, query, weights)
        support = problem.objective.gradient(found.phi)

        def shared(ok: Tensor) -> Params:
            if self.nonfinite == "propagate" and weights is None:
                return {name: torch.where(ok.all(), t, 0.0) for name, t in found.shared.items()}
            if may_read_values(ok) and bool(ok.all()):
                return found.shared
            # The derivative of a failed task is not finite, and cannot be subtracted from the sum.
            instead = replacement(ok)
            again = self._differentiate(
                self._problem(rows_of_tasks(batch.support, instead), instead, check=False),
                query.of_tasks(rows_of_tasks(batch.query, instead), self._constants()),
                torch.where(ok, torch.ones_like(found.value) if weights is None else weights, 0.0),
            )
            return {name: torch.where(ok.any(), total, 0.0) for name, total in again.shared.items()}

        return self._mean(problem, found, support, shared, weights)

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        problem = self._problem(support, check=False)
        given = self._given(problem, problem.start(), {})
        phi, state = given.theta, State()
        for step in range(self.inner.steps):
            phi, state = self._step(problem.objective_at(step), step, phi, state, given)
        return self.layout.unflatten(phi)

    def _differentiate(
        self, problem: Proximal, query: Objective, seeds: Tensor | None = None
    ) -> Derivatives:
        """The derivatives of the query losses, or of `seeds` [B] times them."""
        steps = self.inner.steps
        last = steps if self.last is None else min(self.last, steps)
        weights = self._weights()
        # On the host the query losses of weight 0 are left out.
        known = weights.tolist() if weights is not None and may_read_values(weights) else None
        with torch.enable_grad():
            rows = {name: _rows(t, problem.tasks) for name, t in self._own().items()}
            theta = problem.start().requires_grad_()
            given = self._given(problem, theta, rows)
            before, state = theta, State()
            with torch.no_grad():
                for step in range(steps - last):
                    before, state = self._step(
                        problem.objective_at(step), step, before, state, given
                    )
            # Without lam, the derivative of the earlier steps is taken to be the identity, else 0.
            carried = theta if last == steps or self.lam is None else theta.detach()
            phi = before.detach() + (carried - theta.detach())
            shared = {name: t.detach().requires_grad_() for name, t in self.shared.items()}
            if shared:
                query = _at(query, shared)
                if not self.first_order:
                    problem = problem.with_objective(_at(problem.objective, shared))
            values = []
            for step in range(steps - last, steps):
                phi, state = self._step(problem.objective_at(step), step, phi, state, given)
                if weights is not None and step < steps - 1 and (known is None or known[step]):
                    values.append(weights[step] * query.losses(phi))
            losses = query.losses(phi)
            query.check_inputs(losses, phi)
            value = losses if weights is None else sum(values, weights[-1] * losses)
            leaves = [theta, *rows.values(), *shared.values()]
            with problem.objective.computing():
                gradients = torch.autograd.grad(
                    value.sum() if seeds is None else (seeds * value).sum(),
                    leaves,
                    allow_unused=True,
                    materialize_grads=True,
                )
        by_rows = dict(zip(["theta", *rows], gradients[: 1 + len(rows)], strict=True))
        by_shared = dict(zip(shared, gradients[1 + len(rows) :], strict=True))
        return Derivatives(phi.detach(), losses.detach(), value.detach(), by_rows, by_shared)

    def _step(
        self, objective: Objective, step: int, phi: Tensor, state: State, given: Given
    ) -> tuple[Tensor, State]:
        """phi and state after one inner step; in the graph of phi and `given` in grad mode."""
        if self.first_order:
            gradient = objective.gradient(phi.detach())[1]
        else:
            gradient = objective.differentiable_gradient(phi)
        if given.pull is not None:
            gradient = gradient + given.pull(phi - given.theta)
        direction, state = self.inner.direction(gradient, state, step)
        return phi - given.rates[step] * direction, state

    def _given(self, problem: Proximal, theta: Tensor, rows: Params) -> Given:
        """For theta [B, D], and the rows of `_own()`; without them, constants."""
        lr, steps = self.inner.lr, self.inner.steps
        rates = lr.rates(steps, rows) if isinstance(lr, StepSize) else [lr] * steps
        if self.lam is None:
            return Given(theta, rates, None)
        return Given(theta, rates, product(rows[_LAM]) if _LAM in rows else problem.lam.mv)

    def _own(self) -> Params:
        """What has a row for each task in the graph, besides theta."""
        own = {_LAM: flatten_lam(self.layout, lam_value(self.lam))} if self._learns_lam() else {}
        return own | self._step_sizes()

    def _learns_lam(self) -> bool:
        return bool(learned_lam(self.lam))

    def _step_sizes(self) -> Params:
        return self.inner.lr.learned() if isinstance(self.inner.lr, StepSize) else {}

    def _weights(self) -> Tensor | None:
        weights = self.step_weights
        if weights is not None and not isinstance(weights, Tensor):
            with torch.no_grad():
                weights = weights(self._meta_step)
            check_values(weights, self.layout, self.inner.steps)
        return None if weights is None else weights.to(self.layout.dtype)

    def _constants(self) -> Params:
        return {name: tensor.detach() for name, tensor in self.shared.items()}

    def _problem(
        self, support: Any, tasks: Tensor | None = None, *, check: bool = True
    ) -> Proximal:
        """The inner problems of tasks 0, 1, ..., or of those with other numbers [B]."""
        support, batches = split_batches(support)
        objective = Objective(
            self.loss, self.layout, support, "support", self._constants(), check=check
        )
        theta = self.layout.flatten(self.params).detach()
        lam = flatten_lam(self.layout, lam_value(self.lam)).detach()
        if tasks is not None and lam.dim() == 3:
            lam = lam[tasks]
        return Proximal(objective, theta, lam, batches=batches)

    def _mean(
        self,
        problem: Proximal,
        found: Derivatives,
        support: tuple[Tensor, Tensor],  # losses [B] and their gradients [B, D], at phi
        shared: Callable[[Tensor], Params],
        weights: Tensor | None,
    ) -> MetaGradient:
        """The mean over the tasks, with a report.

        Args:
            shared: from the tasks that are ok, [B] bool, the sums over them of the gradients of the
                shared parameters.
            weights: relative weights of the tasks, [B], which the derivatives contain; or None.
        """
        layout, phi, (support_loss, support_gradient) = problem.layout, found.phi, support
        rows = [gradient.reshape(problem.tasks, -1) for gradient in found.rows.values()]
        numbers = [support_loss[:, None], *rows]
        if self.step_weights is not None:
            numbers.append(found.value[:, None])
        finite = torch.cat([t.isfinite() for t in numbers], 1).all(1)
        if not may_read_values(phi):  # then lam's values have not been checked
            finite = finite & problem.lam.is_valid()
        residual = torch.where(finite, problem.residual(phi, support_gradient), torch.nan)
        status = torch.full_like(new_status(problem), Status.MAX_ITER)
        status = update_status(status, residual, None)
        inner = Solution(phi, status, torch.full_like(status, self.inner.steps), residual)
        ok = ~failed_tasks(found.query_loss, inner)
        sums = shared(ok) if self.shared else {}
        if sums:  # if a sum is not finite, the task responsible is unknown, so all fail
            valid = all_finite(sums)
            inner = replace(inner, status=status.masked_fill(~valid, Status.NONFINITE))
            ok = ok & valid
            sums = {name: torch.where(valid, total, 0.0) for name, total in sums.items()}
        weight = task_weight(ok, self.nonfinite, layout.dtype, weights)
        # Weights before the sum, which may overflow where the mean does not.
        means = [(torch.where(ok[:, None], each, 0.0) * weight).sum(0) for each in rows]
        named = dict(zip(found.rows, means, strict=True))
        lam, hyperparameters = self._lam_gradient(named.get(_LAM))
        for name, tensor in self._step_sizes().items():
            if name in named:
                hyperparameters[name] = named[name].view_as(tensor)
        return MetaGradient(
            params=layout.unflatten(named["theta"]),
            lam=lam,
            support_loss=support_loss,
            query_loss=found.query_loss,
            adapted=layout.unflatten(phi),
            inner=inner,
            linear=None,
            hyperparameters=hyperparameters,
            shared={name: total * weight for name, total in sums.items()},
            weights=weights,
        )

    def _lam_gradient(self, gradient: Tensor | None) -> tuple[Any, Params]:
        """In lam's form, and for a `ProximalStrength`, from the flat gradient with respect to Λ."""
        if gradient is None:
            return None, {}
        with torch.enable_grad():
            value = lam_value(self.lam)
        if gradient.numel() > max(self.layout.dim, 1):
            matrix = gradient.view(self.layout.dim, self.layout.dim)
            gradient = 0.5 * (matrix + matrix.T)
        lam = unflatten_lam_gradient(self.layout, value, gradient)
        return lam, strength_gradients(self.lam, value, lam)


def _rows(tensor: Tensor, tasks: int) -> Tensor:
    return tensor.detach().expand(tasks, *tensor.shape).clone().requires_grad_()


def _at(objective: Objective, shared: Params) -> Objective:
    """The same losses in the graph of the shared parameters, by PyTorch's operators."""
    found = objective.of_tasks(objective.data, shared)
    found.recorded = None
    return found


def checked(inner: GradientDescent | Adam | None) -> GradientDescent | Adam:
    """The inner solver of an unrolled method, which differentiates its steps.

    Raises:
        TypeError, ValueError: it is neither `GradientDescent` nor `Adam`, or has a `tol`.
    """
    inner = GradientDescent() if inner is None else inner
    if getattr(type(inner), "solve", None) not in (GradientDescent.solve, Adam.solve):
        raise TypeError(
            "inner must be an instance of GradientDescent or Adam, whose steps are differentiated, "
            f"got {kind_of(inner)}: IMAML takes any inner solver"
        )
    if inner.tol is not None:
        raise ValueError("inner must have no tol: a differentiated solver takes all steps")
    return inner
