"""Losses of a batch of tasks, with their gradients and curvature, on [B, D] row buffers.

Only the forward pass is vmapped. The losses of the tasks are summed, so one call of `autograd.grad`
on the stacked rows gives every task's gradient: row i of the sum's gradient is that of task i.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext._checks import check_scalar
from imaml_ext.data.mini_batches import MiniBatches
from imaml_ext.ops.batching import for_each_task
from imaml_ext.ops.vmap_layers import task_layers
from imaml_ext.problem.batch import check_constant, count_tasks, versions
from imaml_ext.problem.captured import captured_message, leaves_besides
from imaml_ext.problem.differentiation import (
    Computing,
    check_inference_mode,
    check_no_transform,
    vjp,
)
from imaml_ext.problem.layout import Layout, Params
from imaml_ext.problem.module_loss import ModuleLoss, call_loss
from imaml_ext.problem.outputs import (
    OutputParts,
    check_parameters,
    check_stored,
    refusing_stored,
)
from imaml_ext.problem.programs import recorded
from imaml_ext.problem.unsupported import check_differentiable_twice
from imaml_ext.problem.usage import Usage

T = TypeVar("T")
Matvec = Callable[[Tensor], Tensor]  # [B, D] -> [B, D], row i times the matrix of task i
CurvatureKind = Literal["hessian", "ggn"]
Loss = Callable[[Params, Any], Tensor]  # (params, data) -> 0-d, for one task


class Linearisation(NamedTuple):
    """Losses, gradients and curvature products of a batch of tasks at one point."""

    losses: Tensor  # [B]
    gradient: Tensor  # [B, D]
    matvec: Matvec


class Objective:
    """The loss of each of B tasks as a function of its row of parameters.

    Args:
        loss: `(params, data) -> scalar` for one task.
        layout: parameter layout of the rows.
        data: pytree of [B, N, ...] tensors.
        label: name of the data in error messages.
        shared: parameters common to all tasks, {name: tensor}; also passed to the loss.
        check: whether to refuse data, and other tensors, that require grad: the losses are
            differentiated by the rows only.
        track: whether to keep track of what the losses use, as `usage`.

    Attributes:
        leaves: the tensors of the data.
        tasks: B.
        usage: what the first evaluation of the losses used; None if it is not tracked.
        recorded: the programs that are used instead of PyTorch's operators; None without.

    Raises:
        TypeError: a leaf of the data is not a tensor, or its floating dtype differs from the rows',
            or the data are `MiniBatches`.
        ValueError: the data has no leaves, B or N is 0, leading sizes or devices differ, or a
            tensor requires grad.
        RuntimeError: called inside a transform of `torch.func` or forward-mode differentiation.
    """

    def __init__(
        self,
        loss: Loss,
        layout: Layout,
        data: Any,
        label: str = "data",
        shared: Params | None = None,
        *,
        check: bool = True,
        track: bool = False,
    ) -> None:
        check_no_transform()
        if isinstance(data, MiniBatches):
            raise TypeError(f"{label} cannot be MiniBatches: only support can")
        self.loss = loss
        self.layout = layout
        self.data = data
        self.shared = shared or {}
        self.leaves = pytree.tree_leaves(data)
        self.tasks = count_tasks(layout, self.leaves, label)
        self._label = label
        self._unchecked = check
        self.usage = Usage(loss, data, self.shared) if track else None
        self._versions: list[int] | None = versions(self.leaves)  # None after the first evaluation
        if check:
            check_constant(self.leaves, label)
        self.recorded = recorded(self)

    def with_inputs(self, data: Any, shared: Params) -> "Objective":
        """The same losses at other data, and at other values of the shared parameters."""
        other = copy(self)
        other.data, other.leaves, other.shared = data, pytree.tree_leaves(data), shared
        other._unchecked, other._versions, other.recorded = False, None, None
        return other

    def of_tasks(self, data: Any, shared: Params, *, check: bool = True) -> "Objective":
        """The same losses for other tasks, or for other examples of the same tasks."""
        check = check and self._unchecked
        return Objective(self.loss, self.layout, data, self._label, shared, check=check)

    def losses(self, rows: Tensor, *, recorded: bool = True) -> Tensor:
        """[B] from [B, D].

        Args:
            recorded: whether to use programs, by which it can be differentiated only once.
        """
        if recorded and self.recorded is not None:
            found = self.recorded.losses(rows)
            if found is not None:
                return found
        return self._losses(rows)

    def _losses(self, rows: Tensor) -> Tensor:
        with self.computing():
            losses: Tensor = for_each_task(self._one_loss, self.tasks, rows, self.data)
        self._end_first_evaluation()
        return losses

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B] and gradients [B, D]."""
        if self.recorded is not None and (found := self.recorded.gradient(rows)) is not None:
            return found
        leaf, losses = self._record(self._losses, rows)
        self.check_inputs(losses, leaf)
        with self.computing():
            return losses.detach(), vjp(losses, leaf, torch.ones_like(losses))

    def differentiable_gradient(self, rows: Tensor) -> Tensor:
        """Gradients [B, D], in the graph of `rows` in grad mode."""
        if not torch.is_grad_enabled():
            return self.gradient(rows)[1]
        if self.recorded is not None and rows.requires_grad:
            found = self.recorded.differentiable_gradient(rows)
            if found is not None:
                return found
        at = rows if rows.requires_grad else rows.detach().requires_grad_()
        losses = self._losses(at)
        with self.computing():
            if self._unchecked:  # once: unrolled steps chain up to thousands of such graphs
                check_differentiable_twice(losses, at)
            self.check_inputs(losses, at)
            return vjp(losses, at, torch.ones_like(losses), create_graph=True)

    def linearise(self, rows: Tensor, kind: CurvatureKind) -> Linearisation:
        """Losses, gradients and curvature products at rows [B, D].

        The graph of the gradient is recorded once; each product is one backward pass through it.
        The graph is freed with `matvec`.
        """
        if self.recorded is not None:
            found = self.recorded.linearise(rows, kind)
            if found is not None:
                return Linearisation(*found)
        with self.computing():
            at = self._hessian(rows) if kind == "hessian" else self._gauss_newton(rows)

        def matvec(vector: Tensor) -> Tensor:
            with self.computing():
                return at.matvec(vector)

        return at._replace(matvec=matvec)

    def check_inputs(self, losses: Tensor, rows: Tensor) -> None:
        """Check, once, that the losses depend on the rows and on no other tensor in a graph.

        Raises:
            ValueError: they do not.
        """
        if self._unchecked:
            self._unchecked = False
            self._check_graph(losses, rows, self._losses)

    def _check_graph(
        self, outputs: Tensor, at: Tensor, function: Callable[[Tensor], Tensor]
    ) -> None:
        leaves, contains, complete = leaves_besides(outputs, at)
        own = {id(tensor) for tensor in self.shared.values() if tensor.requires_grad}
        leaves = [leaf for leaf in leaves if id(leaf) not in own]
        others = bool(leaves)
        if not (complete or others or own):
            with torch.enable_grad():
                others = function(at.detach()).requires_grad
        if others:
            raise ValueError(captured_message(self.loss, leaves, self.layout.shapes))
        if complete and not contains:
            raise ValueError(
                f"{self._label}: the loss does not depend differentiably on the parameters"
            )

    def computing(self) -> AbstractContextManager[None]:
        """Context in which losses are computed and differentiated."""
        return Computing(self.layout.device)

    def _hessian(self, rows: Tensor) -> Linearisation:
        leaf, losses = self._record(self._losses, rows)
        self.check_inputs(losses, leaf)
        check_differentiable_twice(losses, leaf)
        gradient = vjp(losses, leaf, torch.ones_like(losses), create_graph=True)
        return Linearisation(
            losses.detach(),
            gradient.detach(),
            lambda vector: vjp(gradient, leaf, vector, retain_graph=True),
        )

    def _gauss_newton(self, rows: Tensor) -> Linearisation:
        """`J' H_out J`: the Jacobian of the outputs and the criterion's Hessian in the outputs.

        J is applied by differentiating the linear function `u -> J' u` with respect to u.
        Source: Schraudolph 2002.
        """
        if not isinstance(self.loss, ModuleLoss):
            raise TypeError(
                "curvature='ggn' needs the model's outputs: build the loss with module_loss, "
                "or use curvature='hessian'"
            )
        loss, parts, is_known = self.loss, OutputParts(), self.loss.uses_outputs_only
        x, y = loss.pair(self.data)
        constants: list[Tensor] = []
        together: list[Tensor] = []  # the criterion while forward's attributes exist
        copies = rows.detach().requires_grad_()

        def outputs_at(leaf: Tensor) -> Tensor:
            nonlocal constants, together
            one: Any = partial(self._one_output, parts=parts)
            given = (leaf, x) if is_known else (leaf, self.data, copies)
            outputs, constants, *together = for_each_task(one, self.tasks, *given)
            return cast(Tensor, outputs)

        def losses_at(z: Tensor) -> Tensor:
            one = partial(self._one_criterion, parts=parts)
            return cast(Tensor, for_each_task(one, self.tasks, z, constants, y))

        leaf, outputs = self._record(outputs_at, rows)
        if not is_known:
            check_parameters(together[0], copies, loss.model)
        with nullcontext() if is_known else refusing_stored():
            z, losses = self._record(losses_at, outputs)
        self._end_first_evaluation()
        if not is_known:
            check_stored(together[0], losses, leaf)
            loss.uses_outputs_only = True
        if self._unchecked:
            self._unchecked = False
            self._check_graph(outputs, leaf, outputs_at)
            self._check_graph(losses, z, losses_at)
        check_differentiable_twice(losses, z)
        check_differentiable_twice(outputs, leaf)
        out_grad = vjp(losses, z, torch.ones_like(losses), create_graph=True)
        gradient = vjp(outputs, leaf, out_grad.detach(), retain_graph=True)
        u = torch.zeros_like(outputs, requires_grad=True)
        transposed = vjp(outputs, leaf, u, create_graph=True)

        def matvec(vector: Tensor) -> Tensor:
            tangent = vjp(transposed, u, vector, retain_graph=True)
            out_hvp = vjp(out_grad, z, tangent, retain_graph=True)
            return vjp(outputs, leaf, out_hvp, retain_graph=True)

        return Linearisation(losses.detach(), gradient, matvec)

    @staticmethod
    def _record(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
        check_inference_mode()
        leaf = at.detach().requires_grad_()
        with torch.enable_grad():
            return leaf, function(leaf)

    def _evaluate(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` with the layers' forms, while what it uses is recorded."""
        recording = nullcontext() if self.usage is None or self.usage.recorded else self.usage
        with task_layers(self.layout.device), recording:
            return function(*args)

    def _end_first_evaluation(self) -> None:
        """Raises ValueError if the loss modified what it used."""
        if self._versions is None:
            return
        before, self._versions = self._versions, None
        for number, (old, new) in enumerate(zip(before, versions(self.leaves), strict=True)):
            if old != new:
                raise ValueError(
                    f"the loss modifies {self._label} (tensor {number}) in place, so that each of "
                    "its evaluations would differ: compute a new tensor, such as x = x / 255"
                )
        if self.usage is not None:
            self.usage.end()

    def _params(self, row: Tensor) -> Params:
        return self.layout.slices(row) | self.shared

    def _one_loss(self, row: Tensor, data: Any) -> Tensor:
        return self._scalar(self._evaluate(call_loss, self.loss, self._params(row), data))

    def _one_output(
        self, row: Tensor, data: Any, copy: Tensor | None = None, *, parts: OutputParts
    ) -> tuple[Any, ...]:
        assert isinstance(self.loss, ModuleLoss)
        params = self._params(row)
        if copy is None:
            return parts.take_apart(self._evaluate(self.loss.outputs, params, data))
        given = params, self._params(copy), data, parts
        z, constants, loss = self._evaluate(self.loss.parts_and_loss, *given)
        return z, constants, self._scalar(loss)

    def _one_criterion(
        self, z: Tensor, constants: list[Tensor], y: Any, *, parts: OutputParts
    ) -> Tensor:
        assert isinstance(self.loss, ModuleLoss)
        outputs = parts.put_together(z, constants)
        return self._scalar(self._evaluate(self.loss.of_outputs, outputs, y, self.shared))

    def _scalar(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor) and loss.shape == (self.tasks,):
            for name, tensor in self.shared.items():
                if tensor.shape[:1] == loss.shape:
                    raise ValueError(
                        f"the loss of one task has the shape {list(loss.shape)} of "
                        f"shared[{name!r}], which is the same for all tasks: pass per-task values "
                        "in the data"
                    )
        check_scalar("the loss", loss)
        scalar: Tensor = loss if loss.dtype == self.layout.dtype else loss.to(self.layout.dtype)
        return scalar


def check_same_tasks(support: Objective, query: Objective) -> None:
    if support.tasks != query.tasks:
        raise ValueError(
            f"support has {support.tasks} tasks and query {query.tasks}: B must be the same"
        )
