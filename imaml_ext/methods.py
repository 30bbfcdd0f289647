"""Meta-learning methods with one interface: a batch of tasks in, a meta-gradient out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imaml_ext.flat import Lam, Layout, Params
from imaml_ext.implicit import implicit_meta_grad
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.linear import LinearSolver
from imaml_ext.meta_gradient import (
    ImplicitMetaGradient,
    MetaGradient,
    Nonfinite,
    check_nonfinite,
)
from imaml_ext.objective import Loss, Objective
from imaml_ext.proximal import Proximal
from imaml_ext.shared import check_shared
from imaml_ext.strength import ProximalStrength
from imaml_ext.tasks import TaskBatch


class Method(ABC):
    """Owns the meta-parameters, `params`, and whatever else it learns.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}; updated in place by the outer optimizer. A parameter of the
            model that is not in it keeps the model's value: it is neither adapted nor learned.
        query_loss: judged at phi instead of `loss`.
        nonfinite: as in `implicit_meta_grad`.

    Raises:
        ValueError: a tensor of `params` does not require grad, or has a name that the method needs.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "refuse",
    ) -> None:
        check_nonfinite(nonfinite)
        self.loss = loss
        self.params: Params = dict(params)
        _check_learned("params", self.params)
        self.query_loss = loss if query_loss is None else query_loss
        self.nonfinite: Nonfinite = nonfinite

    @property
    def layout(self) -> Layout:
        """Names and shapes of theta."""
        return Layout(self.params)

    @abstractmethod
    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        """The mean gradient of the query loss over the batch's tasks; nothing is updated.

        Raises:
            TypeError, ValueError: the batch does not fit the parameters; see each message.
        """

    @abstractmethod
    def adapt(self, support: Any) -> Params:
        """phi for each task, {name: [B, ...]}, without a graph: what evaluation uses.

        Args:
            support: a pytree of [B, ...] tensors.
        """

    def beside(self, phi: Params) -> Params:
        """phi, {name: [B, ...]}, and beside it what a loss gets that is the same for all tasks."""
        return phi

    def extra(self) -> Params:
        """What the method learns beside theta, named as in `MetaGradient.named`."""
        return {}

    def learned(self) -> Params:
        """Every tensor that the outer optimizer updates, named as in `MetaGradient.named`."""
        return self.params | self.extra()


class IMAML(Method):
    """Implicit MAML: `implicit_meta_grad`. The defaults are the paper's for 5-way Omniglot.

    Args:
        loss, params, query_loss, nonfinite: as in `Method`.
        lam: proximal strength, as in `implicit_meta_grad`; its tensors that require grad are
            learned too, as they are. Learn a `ProximalStrength` instead: it stays positive.
        inner, cg, shared: as in `implicit_meta_grad`; what is shared is learned too.
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
        cg: LinearSolver | None = None,
        shared: Mapping[str, Tensor] | None = None,
        adapt_proximal: bool = True,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "refuse",
    ) -> None:
        super().__init__(loss, params, query_loss=query_loss, nonfinite=nonfinite)
        self.lam = lam
        self.layout.flatten_lam(self._strength())  # says now what is wrong with it
        check_shared(shared, self.layout)
        self.shared: Params = dict(shared or {})
        _check_learned("shared", self.shared)
        if len({id(tensor) for tensor in self.learned().values()}) < len(self.learned()):
            raise ValueError("a tensor of lam is there under two names: learn a ProximalStrength")
        self.inner = GradientDescent() if inner is None else inner
        self.cg = cg
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
            cg=self.cg,
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
        lam = self.layout.flatten_lam(self._strength())
        if not self.adapt_proximal:
            lam = lam.new_zeros(1)
        psi = check_shared(self.shared, self.layout)
        objective = Objective(self.loss, self.layout, support, "support", psi)
        problem = Proximal(objective, self.layout.flatten(self.params), lam)
        return self.layout.unflatten(self.inner.solve(problem).value)

    def beside(self, phi: Params) -> Params:
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


def _check_learned(label: str, tensors: Params) -> None:
    for name, tensor in tensors.items():
        if not tensor.requires_grad:
            raise ValueError(
                f"{label}[{name!r}] does not require grad: leave it out to keep it as it is, "
                "or call requires_grad_() to learn it"
            )
        if name.split(".")[0] in ("lam", "log_lr"):
            raise ValueError(f"{label}[{name!r}]: this name is taken by what the method learns")


def _pairs(lam: Any, gradients: Any) -> tuple[list[Tensor], list[Tensor]]:
    return list(lam.values()), [gradients[name] for name in lam]
