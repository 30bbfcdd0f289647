"""The interface of meta-learning methods: from a batch of tasks to a meta-gradient."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from imaml_ext._checks import check_callable, check_not_of_torch
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.meta_gradient import MetaGradient, Nonfinite, check_nonfinite
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.problem.objective import Loss


class Method(ABC):
    """Owns the meta-parameters, `params`, and everything else that it learns.

    Args:
        loss: `(params, data) -> scalar` for one task; see `module_loss`.
        params: theta, {name: tensor}, updated in place by the outer optimizer. A parameter of the
            model that is missing keeps the model's value: it is neither adapted nor learned, and
            must not require grad.
        query_loss: evaluated at phi on the query set, instead of `loss`.
        nonfinite: as in `implicit_meta_grad`.

    Attributes:
        shared: parameters that are learned but not adapted, {name: tensor}.

    Raises:
        TypeError: a loss is not a function, or `params` does not map names to tensors.
        ValueError: a tensor of `params` does not require grad, or has a reserved name.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        query_loss: Loss | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        check_nonfinite(nonfinite)
        check_losses(loss, query_loss)
        Layout(params)  # checks them
        self.loss = loss
        self.query_loss = loss if query_loss is None else query_loss
        self.params: Params = dict(params)
        self.shared: Params = {}
        check_learned("params", self.params)
        self.nonfinite: Nonfinite = nonfinite

    @property
    def layout(self) -> Layout:
        """Names and shapes of theta."""
        return Layout(self.params)

    @abstractmethod
    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        """The mean gradient of the query loss over the batch's tasks; nothing is updated.

        Raises:
            TypeError, ValueError: the batch does not match the parameters.
        """

    @abstractmethod
    def adapt(self, support: Any) -> Params:
        """phi for each task, {name: [B, ...]}, without a graph; used by evaluation.

        Args:
            support: a pytree of [B, ...] tensors, or `MiniBatches`.
        """

    def at_step(self, step: int | Tensor) -> None:  # noqa: B027
        """Set the number of the meta-step, for methods that depend on it.

        `Trainer` calls it before each meta-gradient.

        Args:
            step: counted from 0; a 0-d tensor if the whole meta-step runs on the device.
        """

    def with_shared(self, phi: Params) -> Params:
        """phi, {name: [B, ...]}, with the shared parameters expanded to all tasks."""
        tasks = next(iter(phi.values())).shape[0]
        return phi | {name: t.detach().expand(tasks, *t.shape) for name, t in self.shared.items()}

    def hyperparameters(self) -> Params:
        """What the method learns besides parameters, named as in `MetaGradient.named`."""
        return {}

    def buffers(self) -> Params:
        """Tensors that `meta_gradient` changes, such as running statistics; kept in checkpoints."""
        return {}

    def learned(self) -> Params:
        """Every tensor that the outer optimizer updates, named as in `MetaGradient.named`."""
        return self.params | self.shared | self.hyperparameters()


def check_losses(loss: Any, query_loss: Any = None) -> None:
    """Raises TypeError for anything but functions of (params, data)."""
    remedy = "build it by module_loss(model, criterion)"
    for name, value in (("loss", loss), ("query_loss", query_loss)):
        if isinstance(value, ModuleLoss) or (value is None and name == "query_loss"):
            continue
        check_callable(name, value, "(params, data)", remedy)
        check_not_of_torch(name, value, "(params, data)", remedy)


def check_learned(label: str, tensors: Params) -> None:
    for name, tensor in tensors.items():
        if not tensor.requires_grad:
            raise ValueError(
                f"{label}[{name!r}] does not require grad: leave it out to keep its value, or "
                "call requires_grad_() to learn it; for a model, pass "
                "dict(model.named_parameters()), not state_dict(), whose tensors are detached"
            )
        if name.split(".")[0] in ("lam", "lr", "log_lr"):
            raise ValueError(f"{label}[{name!r}]: the names lam, lr and log_lr are reserved")
