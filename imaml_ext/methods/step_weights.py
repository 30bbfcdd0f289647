"""Weights of the query losses after each inner step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext._checks import check_integer, kind_of
from imaml_ext.problem.layout import Layout

StepWeights = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MultiStepLoss:
    """The annealed weights of MAML++ for the query losses after each of K inner steps.

    At meta-step `t < anneal`, each step but the last has the weight
    `max(1 - t / anneal, 0.03) / K`, and the last has the rest; from meta-step `anneal` on, the last
    has the weight 1 and the others 0. Calling it with t, a 0-d integer tensor, returns the weights,
    [K] float64.

    Args:
        steps: K, the number of inner steps.
        anneal: number of meta-steps in which all inner steps have a weight.

    Raises:
        TypeError, ValueError: a number is not an integer, or less than 1.

    Source: Antoniou, Edwards, Storkey 2019, "How to train your MAML"; the authors' code counts
    epochs instead of meta-steps.
    """

    steps: int
    anneal: int

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, minimum=1)
        check_integer("anneal", self.anneal, minimum=1)

    def __call__(self, meta_step: Tensor) -> Tensor:
        weight = (1 - meta_step.double() / self.anneal).clamp_min(0.03) / self.steps
        weight = torch.where(meta_step < self.anneal, weight, 0.0)
        rest = 1 - (self.steps - 1) * weight
        return torch.cat([weight.expand(self.steps - 1), rest[None]])


def check_step_weights(weights: Any, layout: Layout, steps: int) -> None:
    """Raises TypeError or ValueError for anything but constants [K], or a function."""
    if isinstance(weights, MultiStepLoss) and weights.steps != steps:
        raise ValueError(
            f"step_weights is for {weights.steps} steps, but the inner solver takes {steps}: make "
            "the numbers equal"
        )
    if isinstance(weights, Tensor):
        if weights.requires_grad:
            raise ValueError("step_weights requires grad, but is not learned: detach it")
        check_values(weights, layout, steps)
    elif not callable(weights):
        raise TypeError(
            "step_weights must be a tensor, or a function of the meta-step such as MultiStepLoss, "
            f"got {kind_of(weights)}"
        )


def check_values(weights: Any, layout: Layout, steps: int) -> None:
    """Raises TypeError or ValueError for anything but a tensor [K]."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"step_weights must return a tensor, got {kind_of(weights)}")
    if steps == 0 or weights.shape != (steps,) or weights.device != layout.device:
        raise ValueError(
            f"step_weights must be of shape [{steps}] on {layout.device}, a weight for each inner "
            f"step, got {list(weights.shape)} on {weights.device}"
        )
