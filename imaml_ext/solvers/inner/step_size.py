"""Step sizes as a module: one, or one per parameter tensor, scalar parameter or step."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imaml_ext._checks import check_choice, check_integer, check_range
from imaml_ext.problem.layout import Layout, Params


class StepSize(nn.Module):
    """Learnable step sizes, for `GradientDescent(lr=StepSize(...))` and `Adam(lr=StepSize(...))`.

    The unrolled methods, except `Reptile`, learn those of its parameters that require grad. A
    minimum does not depend on the step sizes with which it was found, so `IMAML`,
    `implicit_meta_grad` and `adapt` accept only constant ones: call `requires_grad_(False)`.

    Calling it returns the step sizes: a tensor if `form` is "scalar", otherwise {name: tensor};
    with `steps`, each has a leading dimension of that size.

    Args:
        params: theta, {name: tensor}.
        initial: initial value of every step size.
        form: one number ("scalar"), one per parameter tensor ("tensor"), or one per scalar
            parameter ("diagonal": Meta-SGD, Li et al. 2017).
        steps: number of inner steps, each with its own step sizes; "tensor" with `steps` is LSLR of
            MAML++ (Antoniou, Edwards, Storkey 2019). None: the same in every step.
        positive: learn the logarithms, so that step sizes stay positive. False: learn the step
            sizes themselves, which may become negative, as in Meta-SGD.

    Raises:
        TypeError, ValueError: `initial` is not positive and finite, `steps` is less than 1, or
            `form` or `positive` is unknown.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        initial: float = 0.1,
        *,
        form: Literal["scalar", "tensor", "diagonal"] = "scalar",
        steps: int | None = None,
        positive: bool = True,
    ) -> None:
        super().__init__()
        check_range("initial", initial, "(0, inf)")
        check_choice("form", form, ("scalar", "tensor", "diagonal"))
        check_choice("positive", positive, (False, True))
        if steps is not None:
            check_integer("steps", steps, minimum=1)
        self.form, self.steps, self.positive = form, steps, positive
        layout = Layout(params)
        self._shapes = dict(layout.shapes)
        batch = () if steps is None else (steps,)
        own: list[Any] = [()] if form == "scalar" else [()] * len(self._shapes)
        if form == "diagonal":
            own = list(self._shapes.values())
        self.values = nn.ParameterList()
        for shape in own:
            sizes = torch.full((*batch, *shape), initial, dtype=layout.dtype, device=layout.device)
            self.values.append(nn.Parameter(sizes.log() if positive else sizes))

    def forward(self) -> Tensor | Params:
        """The step sizes, in the graph of the parameters."""
        sizes = [value.exp() if self.positive else value for value in self.values]
        return sizes[0] if self.form == "scalar" else dict(zip(self._shapes, sizes, strict=True))

    def named(self) -> Params:
        """The parameters as "log_lr" or "log_lr.NAME"; as "lr" or "lr.NAME" if not `positive`."""
        prefix = "log_lr" if self.positive else "lr"
        if self.form == "scalar":
            return {prefix: self.values[0]}
        names = (f"{prefix}.{name}" for name in self._shapes)
        return dict(zip(names, self.values, strict=True))

    def learned(self) -> Params:
        """Those of `named()` that require grad."""
        return {name: value for name, value in self.named().items() if value.requires_grad}

    def check(self, layout: Layout, steps: int) -> None:
        """Raises ValueError unless it fits these parameters and this number of steps."""
        if self.steps not in (None, steps):
            raise ValueError(
                f"the StepSize is for {self.steps} steps, but the solver takes {steps}: make the "
                "numbers equal"
            )
        layout.check_like_parameters("the StepSize", self.values[0])
        if self.form != "scalar" and self._shapes != layout.shapes:
            raise ValueError(
                f"the StepSize is for parameters {_listed(self._shapes)}, got "
                f"{_listed(layout.shapes)}: build it from the same params"
            )

    def rates(self, steps: int, rows: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The step sizes of each of `steps` steps, to multiply [B, D] by: [B, 1] or [B, D] each.

        Args:
            rows: values used instead of some of `named()`, [B, ...], one per task. The others are
                constant, and the same for all tasks.
        """
        rows = rows or {}
        values = [rows.get(name, value.detach()[None]) for name, value in self.named().items()]
        if self.positive:
            values = [value.exp() for value in values]
        if self.steps is None:
            return [self._rate(values)] * steps
        by_step = zip(*(value.unbind(1) for value in values), strict=True)
        return [self._rate(each) for each in by_step]

    def _rate(self, values: Sequence[Tensor]) -> Tensor:
        if self.form == "scalar":
            return values[0][:, None]
        tasks = max(len(value) for value in values)
        parts = [
            value.reshape(len(value), value[0].numel()).expand(tasks, shape.numel())
            for value, shape in zip(values, self._shapes.values(), strict=True)
        ]
        return torch.cat(parts, dim=1)


def _listed(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
