"""A backtracking line search for a batch of tasks, each with its own step length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext._checks import check_integer, check_range
from imaml_ext._tracing import may_read_values
from imaml_ext.problem.proximal import Proximal


@dataclass(frozen=True)
class Backtracking:
    """The largest t of 1, shrink, shrink², ... with `G(phi + t d) <= G(phi) + sufficient t ∇G·d`.

    A trial is one forward pass of the batch; each task keeps the first t that it accepts. On an
    accelerator all trials are made, since stopping early would synchronise.

    Args:
        trials: maximum number of step lengths; a task that accepts none does not move.
        shrink: ratio of one step length to the one before.
        sufficient: fraction of the decrease predicted by the gradient that is required.

    Raises:
        TypeError, ValueError: a setting is not a number or out of range.

    Source: Armijo 1966. Near an optimum, a step that raises G by no more than its rounding error is
    accepted too (Hager, Zhang 2005).
    """

    trials: int = 8
    shrink: float = 0.5
    sufficient: float = 1e-4

    def __post_init__(self) -> None:
        check_integer("trials", self.trials, minimum=1)
        check_range("shrink", self.shrink, "(0, 1)")
        check_range("sufficient", self.sufficient, "(0, 1)")

    @torch.no_grad()
    def search(
        self,
        problem: Proximal,
        phi: Tensor,
        direction: Tensor,
        value: Tensor,
        derivative: Tensor,
        running: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new points [B, D], their step lengths t [B], and G at the full step [B].

        Args:
            problem: the inner problems.
            phi, direction: phi and d, [B, D].
            value, derivative: G and `∇G·d` at phi, [B] float64.
            running: tasks that may move, [B] bool; t is 0 for the others, and for those that
                accept no t.
        """
        rounding = rounding_error(phi, value)
        pending = running & (derivative < 0)
        t, at_full = torch.zeros_like(value), value
        length = 1.0
        for trial in range(self.trials):
            if may_read_values(phi) and not bool(pending.any()):
                break
            tried = problem.values(torch.add(phi, direction, alpha=length))
            enough = tried <= value + self.sufficient * length * derivative + rounding
            accepted = pending & enough  # false for NaN
            t = torch.where(accepted, length, t)
            at_full = tried if trial == 0 else at_full
            pending = pending & ~accepted
            length *= self.shrink
        moves = (t > 0)[:, None]
        return torch.where(moves, phi + t[:, None].to(phi.dtype) * direction, phi), t, at_full


def rounding_error(phi: Tensor, value: Tensor) -> Tensor:
    """Estimate of the rounding error of G, computed in phi's dtype, [B]."""
    return 4 * torch.finfo(phi.dtype).eps * value.abs()
