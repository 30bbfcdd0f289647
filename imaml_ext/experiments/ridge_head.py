"""Features that are learned under a ridge-regression head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from imaml_ext.data.mini_batches import split_batches
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.methods.adapt import adapt
from imaml_ext.methods.base import Method
from imaml_ext.methods.meta_gradient import MetaGradient
from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.solvers.inner import HessianFree
from imaml_ext.solvers.inner.base import unverified
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.solution import Status
from imaml_ext.training.snapshot import Snapshot


class RidgeHead(Method):
    """The last layer is fitted to each task by ridge regression, and the other layers are learned.

    With features z(x), the body's d outputs divided by sqrt(d), with a constant 1 appended, the
    logits of task i are `s z(x) phi_i`, where phi_i minimises
    `1/2 ‖z(x_i) phi - onehot(y_i)‖² + lam/2 ‖phi‖²`. The body's parameters, lam (at first 0.1) and
    s (at first 20) are learned, through `adapt`. Batches may differ in the number of classes:
    features for 5-way tasks can be learned from tasks with many more.

    `meta_gradient` runs the body in training mode, and `adapt` in evaluation mode, so batch norms
    may keep running statistics; in a process group, those of rank 0 are saved.

    Args:
        loss: of an `nn.Sequential` whose last layer is an `nn.Linear`.
        shot: support examples per class.

    Raises:
        TypeError: the last layer is not an `nn.Linear`. `meta_gradient` raises a ValueError for a
            batch with weights.

    Source: Bertinetto, Henriques, Torr, Vedaldi 2019, "Meta-learning with differentiable
        closed-form solvers", with an implicit gradient instead of the closed form.
    """

    # The objective is quadratic, so one Newton step minimises it.
    inner = HessianFree(steps=1, linear=ConjugateGradient(max_iter=60, rtol=1e-4), damping=0.0)
    linear = ConjugateGradient(max_iter=40, rtol=1e-3)

    def __init__(self, loss: ModuleLoss, *, shot: int) -> None:
        *body, (self.head_name, head) = loss.model.named_children()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"the last layer must be an nn.Linear, got {type(head).__name__}")
        self.body = nn.Sequential(*(layer for _, layer in body)).eval()
        self.size = head.in_features
        learned = {
            f"{name}.{key}": parameter
            for name, layer in body
            for key, parameter in layer.named_parameters()
        }
        super().__init__(loss, learned)
        self.model, self.criterion, self.shot = loss.model, loss.criterion, shot
        one = torch.ones((), dtype=self.layout.dtype, device=self.layout.device)
        self.log_ridge = (0.1 * one).log().requires_grad_()
        self.log_scale = (20.0 * one).log().requires_grad_()

    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        batch = TaskBatch.of(batch)
        if batch.weights is not None:
            raise ValueError("RidgeHead does not take weights of tasks")
        (support_x, support_y), (query_x, query_y) = batch.support, batch.query
        learned, before = self.learned(), Snapshot(list(self.buffers().values()))
        with torch.enable_grad(), self._training():
            features = self._features(support_x)
            head = self._head(features, support_y)
            losses = vmap(self.criterion)(_outputs(head, self._features(query_x)), query_y)
            gradients = torch.autograd.grad(losses.mean(), list(learned.values()))
        named = dict(zip(learned, gradients, strict=True))
        with torch.no_grad():
            support_loss = vmap(self.criterion)(_outputs(head, features), support_y)
        losses = losses.detach()
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        before.restore(unless=finite)
        steps = torch.ones(len(losses), dtype=torch.int32, device=losses.device)
        status = torch.full_like(steps, Status.MAX_ITER).masked_fill(~finite, Status.NONFINITE)
        return MetaGradient(
            params={name: named[name] for name in self.params},
            lam=None,
            support_loss=support_loss,
            query_loss=losses,
            adapted=self._phi(head),
            inner=unverified(losses, status, steps),
            linear=None,
            hyperparameters={name: named[name] for name in self.hyperparameters()},
        )

    @torch.no_grad()
    def adapt(self, support: Any) -> Params:
        (x, y), _ = split_batches(support)
        return self._phi(self._head(self._features(x), y))

    def hyperparameters(self) -> Params:
        return {"log_ridge": self.log_ridge, "log_scale": self.log_scale}

    def buffers(self) -> Params:
        return dict(self.model.named_buffers())

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Context in which the body is in training mode."""
        self.body.train()
        try:
            yield
        finally:
            self.body.eval()

    def _features(self, x: Tensor) -> Tensor:
        """Of the images of each task, [B, N, d]; batch norm sees one task at a time."""
        return torch.stack([self.body(task.to(memory_format=torch.channels_last)) for task in x])

    def _head(self, features: Tensor, y: Tensor) -> Params:
        """The adapted last layer, in the graph: weight [B, way, d] and bias [B, way]."""
        way = y.shape[1] // self.shot
        z = features / self.size**0.5
        zero = {"weight": z.new_zeros(way, self.size), "bias": z.new_zeros(way)}
        data = (z, nn.functional.one_hot(y, way).to(z.dtype))
        phi = adapt(
            _squares, zero, data, lam=self.log_ridge.exp(), inner=self.inner, linear=self.linear
        )
        scale = self.log_scale.exp()
        return {"weight": phi["weight"] * (scale / self.size**0.5), "bias": phi["bias"] * scale}

    def _phi(self, head: Params) -> Params:
        """All parameters of the model, {name: [B, ...]}."""
        tasks = len(head["bias"])
        body = {n: p.detach().expand(tasks, *p.shape) for n, p in self.params.items()}
        return body | {f"{self.head_name}.{key}": t.detach() for key, t in head.items()}


def _squares(head: Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """Half the sum of squared errors of one task, from features [N, d] and targets [N, way]."""
    z, targets = data
    return 0.5 * (nn.functional.linear(z, head["weight"], head["bias"]) - targets).square().sum()


def _outputs(head: Params, features: Tensor) -> Tensor:
    """[B, N, way]"""
    return torch.baddbmm(head["bias"][:, None], features, head["weight"].mT)
