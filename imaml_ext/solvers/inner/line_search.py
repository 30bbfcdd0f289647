"""A backtracking line search for a batch of tasks, each with its own step length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext._checks import check_integer
from imaml_ext._tracing import may_read_values
from imaml_ext.problem.proximal import Proximal


@dataclass(frozen=True)
class Backtracking:
    """The largest t of 1, shrink, shrink², ... with `G(phi + t d) <= G(phi) + sufficient t ∇G·d`.

    All tasks at once: a trial is one forward pass of the batch. A task that has its t keeps it. On
    an accelerator all trials are made, since asking whether all tasks are done would synchronise.

    Args:
        trials: step lengths tried at most; a task that accepts none stays where it is.
        shrink: between one trial and the next.
        sufficient: share of the slope that the decrease must reach.

    Raises:
        ValueError: a setting is out of range.

    Source: Armijo 1966. Near an optimum, where G changes by less than its own rounding, a step is
    accepted that raises G by no more than that (Hager, Zhang 2005).
    """

    trials: int = 8
    shrink: float = 0.5
    sufficient: float = 1e-4

    def __post_init__(self) -> None:
        check_integer("trials", self.trials)
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        for name in ("shrink", "sufficient"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}")

    @torch.no_grad()
    def search(
        self,
        problem: Proximal,
        phi: Tensor,
        direction: Tensor,
        value: Tensor,
        slope: Tensor,
        running: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The points reached [B, D], their step lengths t [B], and G at the full step [B].

        Args:
            problem: the inner problems.
            phi, direction: [B, D].
            value, slope: G and `∇G·d` at phi, [B] float64.
            running: tasks that may move, [B] bool; for the others, and where no t was accepted,
                t is 0.
        """
        rounding = rounding_of(phi, value)
        pending = running & (slope < 0)
        t, at_full = torch.zeros_like(value), value
        length = 1.0
        for trial in range(self.trials):
            if may_read_values(phi) and not bool(pending.any()):
                break
            tried = problem.values(torch.add(phi, direction, alpha=length))
            enough = tried <= value + self.sufficient * length * slope + rounding
            accepted = pending & enough  # a value that is NaN is not
            t = torch.where(accepted, length, t)
            at_full = tried if trial == 0 else at_full
            pending = pending & ~accepted
            length *= self.shrink
        moves = (t > 0)[:, None]
        return torch.where(moves, phi + t[:, None].to(phi.dtype) * direction, phi), t, at_full


def rounding_of(phi: Tensor, value: Tensor) -> Tensor:
    """By how much G can be wrong, computed in phi's dtype, [B]."""
    return 4 * torch.finfo(phi.dtype).eps * value.abs()
