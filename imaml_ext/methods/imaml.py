"""Implicit MAML."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.base import Method, check_learned
from imaml_ext.methods.implicit import implicit_meta_grad
from imaml_ext.methods.meta_gradient import ImplicitMetaGradient, Nonfinite
from imaml_ext.methods.shared import check_shared
from imaml_ext.problem.lam import Lam, ProximalStrength, flatten_lam
from imaml_ext.problem.layout import Params
from imaml_ext.problem.objective import Loss, Objective
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.inner import GradientDescent, InnerSolver
from imaml_ext.solvers.linear.base import LinearSolver


class IMAML(Method):
    """Implicit MAML: `implicit_meta_grad`. The defaults are the paper's for 5-way Omniglot.

    Args:
        loss, params, query_loss, nonfinite: as in `Method`.
        lam: proximal strength, as in `implicit_meta_grad`; its tensors that require grad are
            learned too, as they are. Learn a `ProximalStrength` instead: it stays positive.
        inner, linear, shared: as in `implicit_meta_grad`; what is shared is learned too.
        adapt_proximal: whether `adapt`, which evaluation uses, keeps the proximal term.

    Raises:
        TypeError, ValueError: `params`, as in `Method`, or `lam` does not fit.

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
        flatten_lam(self.layout, self._strength())  # says now what is wrong with it
        check_shared(shared, self.layout)
        self.shared: Params = dict(shared or {})
        check_learned("shared", self.shared)
        if len({id(tensor) for tensor in self.learned().values()}) < len(self.learned()):
            raise ValueError("a tensor of lam is there under two names: learn a ProximalStrength")
        self.inner = GradientDescent() if inner is None else inner
        self.linear = linear
        self.adapt_proximal = adapt_proximal

    def meta_gradient(self, batch: TaskBatch) -> ImplicitMetaGradient:
        with torch.enable_grad():
            lam = self._strength()
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
            nonfinite=self.nonfinite,
        )
        strengths = self._strengths()
        if not isinstance(self.lam, ProximalStrength) or not strengths:
            return out
        values, slopes = ([lam], [out.lam]) if isinstance(lam, Tensor) else _pairs(lam, out.lam)
        gradients = torch.autograd.grad(values, list(strengths.values()), slopes)
        return replace(out, extra=out.extra | dict(zip(strengths, gradients, strict=True)))

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        lam = flatten_lam(self.layout, self._strength())
        if not self.adapt_proximal:
            lam = lam.new_zeros(1)
        psi = check_shared(self.shared, self.layout)
        objective = Objective(self.loss, self.layout, support, "support", psi)
        problem = Proximal(objective, self.layout.flatten(self.params), lam)
        return self.layout.unflatten(self.inner.solve(problem).value)

    def with_shared(self, phi: Params) -> Params:
        tasks = next(iter(phi.values())).shape[0]
        return phi | {name: t.detach().expand(tasks, *t.shape) for name, t in self.shared.items()}

    def extra(self) -> Params:
        return self.shared | self._strengths()

    def _strengths(self) -> Params:
        strengths: Params
        if isinstance(self.lam, ProximalStrength):
            strengths = {f"lam.{name}": p for name, p in self.lam.named_parameters()}
        elif isinstance(self.lam, Tensor):
            strengths = {"lam": self.lam}
        elif isinstance(self.lam, Mapping):
            strengths = {f"lam.{name}": tensor for name, tensor in self.lam.items()}
        else:
            strengths = {}
        return {name: tensor for name, tensor in strengths.items() if tensor.requires_grad}

    def _strength(self) -> Lam:
        return self.lam() if isinstance(self.lam, ProximalStrength) else self.lam


def _pairs(lam: Any, gradients: Any) -> tuple[list[Tensor], list[Tensor]]:
    return list(lam.values()), [gradients[name] for name in lam]
