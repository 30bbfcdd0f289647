"""Implicit MAML."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imaml_ext._checks import check_choice, check_instance
from imaml_ext.data.mini_batches import split_batches
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method, check_learned
from imaml_ext.methods.implicit import implicit_meta_grad
from imaml_ext.methods.learned_lam import (
    check_distinct,
    lam_value,
    learned_lam,
    strength_gradients,
)
from imaml_ext.methods.meta_gradient import ImplicitMetaGradient, Nonfinite
from imaml_ext.methods.shared import check_shared
from imaml_ext.problem.lam import Lam, ProximalStrength, flatten_lam
from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.problem.objective import Loss, Objective
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import (
    LBFGS,
    External,
    GradientDescent,
    HessianFree,
    InnerSolver,
)
from imaml_ext.solvers.inner.base import solve_inner
from imaml_ext.solvers.inner.tensor_steps import check_constant_step_size
from imaml_ext.solvers.linear.base import LinearSolver


class IMAML(Method):
    """Implicit MAML: `implicit_meta_grad`. The defaults are the paper's for 5-way Omniglot.

    Args:
        loss, params, query_loss, nonfinite: as in `Method`.
        lam: proximal strength, as in `implicit_meta_grad`; 0 only with `shared`. Its tensors that
            require grad are learned directly; a `ProximalStrength` is learned too, and stays
            positive. One per task fits only batches of that many tasks, always in the same order.
        inner, linear: as in `implicit_meta_grad`.
        shared: as in `implicit_meta_grad`; learned too.
        adapt_proximal: whether `adapt`, which evaluation uses, keeps the proximal term.

    Raises:
        TypeError, ValueError: an argument is invalid, or two of them exclude each other.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, Algorithms 1 and 2.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        lam: Lam | ProximalStrength = 2.0,
        inner: InnerSolver | None = None,
        linear: LinearSolver | None = None,
        shared: Mapping[str, Tensor] | None = None,
        adapt_proximal: bool = True,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__(loss, params, query_loss=query_loss, nonfinite=nonfinite)
        self.lam = lam
        flatten_lam(self.layout, lam_value(lam))  # checks it
        if not shared and isinstance(lam, (int, float)) and lam == 0:
            raise ValueError("with lam=0 theta has no gradient: raise lam, or learn shared=")
        check_shared(shared, self.layout)
        self.shared = dict(shared or {})
        check_learned("shared", self.shared)
        check_distinct(self.learned())
        self.inner = GradientDescent() if inner is None else inner
        self.linear = linear
        self.adapt_proximal = adapt_proximal
        check_choice("adapt_proximal", adapt_proximal, (False, True))
        _check_solvers(self.inner, linear, self.loss)

    def meta_gradient(self, batch: TaskBatch) -> ImplicitMetaGradient:
        batch = TaskBatch.of(batch)
        with torch.enable_grad():
            lam = lam_value(self.lam)
        out = implicit_meta_grad(
            self.loss,
            self.params,
            batch.support,
            batch.query,
            lam=lam,
            inner=self.inner,
            linear=self.linear,
            query_loss=self.query_loss,
            shared=self.shared,
            weights=batch.weights,
            nonfinite=self.nonfinite,
        )
        return replace(out, hyperparameters=strength_gradients(self.lam, lam, out.lam))

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        lam = flatten_lam(self.layout, lam_value(self.lam))
        if not self.adapt_proximal:
            lam = lam.new_zeros(1)
        psi = check_shared(self.shared, self.layout)
        support, batches = split_batches(support)
        objective = Objective(self.loss, self.layout, support, "support", psi, check=False)
        problem = Proximal(objective, self.layout.flatten(self.params), lam, batches=batches)
        return self.layout.unflatten(solve_inner(self.inner, problem).value)

    def hyperparameters(self) -> Params:
        return learned_lam(self.lam)


def _check_solvers(inner: Any, linear: Any, loss: Loss) -> None:
    """Raises TypeError or ValueError for solvers that would fail in every meta-gradient."""
    check_instance("inner", inner, InnerSolver, "pass one, such as GradientDescent()")
    check_constant_step_size(getattr(inner, "lr", 0.0))
    if linear is not None:
        check_instance("linear", linear, LinearSolver, "pass one, such as ConjugateGradient()")
    if not isinstance(loss, ModuleLoss):
        for name, solver in (("linear", linear), ("inner.linear", getattr(inner, "linear", None))):
            if getattr(solver, "curvature", None) == "ggn":
                raise TypeError(
                    f"{name} has curvature='ggn', which needs the model's outputs: build the loss "
                    "by module_loss, or use curvature='hessian'"
                )
    keeps_none = isinstance(inner, (GradientDescent, HessianFree, LBFGS, External))
    if getattr(linear, "preconditioner", None) == "adam" and keeps_none:
        raise ValueError(
            "preconditioner='adam' needs the second moment of the inner solver: use "
            f"inner=Adam(...), got {type(inner).__name__}"
        )
