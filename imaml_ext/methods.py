"""Meta-learning methods with one interface: a batch of tasks in, a meta-gradient out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imaml_ext.cg import ConjugateGradient
from imaml_ext.flat import Lam, Layout, Params
from imaml_ext.implicit import MetaGradient, Nonfinite, implicit_meta_grad
from imaml_ext.inner import GradientDescent, InnerSolver
from imaml_ext.objective import Loss, Objective
from imaml_ext.tasks import TaskBatch


class Method(ABC):
    """Owns the meta-parameters, `params`, and whatever else it learns."""

    params: Params
    nonfinite: Nonfinite = "refuse"

    @abstractmethod
    def meta_gradient(self, batch: TaskBatch) -> MetaGradient: ...

    @abstractmethod
    def adapt(self, support: Any) -> Params:
        """phi for each task, {name: [B, ...]}, without a graph: what evaluation uses."""

    @abstractmethod
    def learned(self) -> Params:
        """Every tensor that the outer optimizer updates, named as in `MetaGradient.named`."""


class IMAML(Method):
    """Implicit MAML (Rajeswaran et al. 2019). The defaults are the paper's for 5-way Omniglot.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}; updated in place by the outer optimizer. A parameter of the
            model that is not in it keeps the model's value: it is neither adapted nor learned.
        lam: proximal strength, as in `implicit_meta_grad`; its tensors that require grad are
            learned too.
        inner, cg, query_loss, nonfinite: as in `implicit_meta_grad`.

    Raises:
        ValueError: a tensor of `params` does not require grad, or is called as lam would be.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        lam: Lam = 2.0,
        inner: InnerSolver | None = None,
        cg: ConjugateGradient | None = None,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "refuse",
    ) -> None:
        self.loss = loss
        self.params = dict(params)
        for name, tensor in self.params.items():
            if not tensor.requires_grad:
                raise ValueError(
                    f"params[{name!r}] does not require grad: leave it out to keep it as it is, "
                    "or call requires_grad_() to learn it"
                )
            if name == "lam" or name.startswith("lam."):
                raise ValueError(f"params[{name!r}]: this name is taken by the proximal strength")
        Layout(self.params).flatten_lam(lam)  # says now what is wrong with it
        self.lam = lam
        self.inner = GradientDescent() if inner is None else inner
        self.cg = ConjugateGradient() if cg is None else cg
        self.query_loss = loss if query_loss is None else query_loss
        self.nonfinite: Nonfinite = nonfinite

    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        return implicit_meta_grad(
            self.loss,
            self.params,
            batch.support,
            batch.query,
            lam=self.lam,
            inner=self.inner,
            cg=self.cg,
            query_loss=self.query_loss,
            nonfinite=self.nonfinite,
        )

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        layout = Layout(self.params)
        theta, lam = layout.flatten(self.params), layout.flatten_lam(self.lam)
        objective = Objective(self.loss, layout, support, "support")
        return layout.unflatten(self.inner.solve(objective, theta, lam).value)

    def learned(self) -> Params:
        if isinstance(self.lam, Tensor):
            strengths = {"lam": self.lam}
        elif isinstance(self.lam, Mapping):
            strengths = {f"lam.{name}": tensor for name, tensor in self.lam.items()}
        else:
            strengths = {}
        return self.params | {name: t for name, t in strengths.items() if t.requires_grad}
