"""Warm starts: solves for the same tasks start at their last solutions."""

import torch
from torch import Tensor

from imaml_ext._tracing import is_recording
from imaml_ext.problem.objective import Objective


class WarmStart:
    """The last phi and x that `adapt` computed for a set of tasks, at which its next solves start.

    When hyper-parameters are optimised, the same tasks are solved repeatedly, each time with
    slightly different hyper-parameters. With a `tol` of the inner solver and an `rtol` of the
    linear solver, solves that start close to the solution take fewer steps; without them, the same
    number of steps gives a more accurate solution.

        warm_start = WarmStart()
        for step in range(1000):
            phi = adapt(loss, params, support, lam=log_lam.exp(), warm_start=warm_start)
            ...

    Use one object for each set of tasks, always in the same order: it cannot detect that the tasks
    have changed. A task whose phi is not finite starts at theta again, and one whose linear solve
    failed starts at x = 0.

    Attributes:
        phi: of the last inner solve, [B, D]; None before the first.
        x: of the last linear solve, [B, D]; None before the first `backward`.
    """

    def __init__(self) -> None:
        self.phi: Tensor | None = None
        self.x: Tensor | None = None

    def reset(self) -> None:
        """Forget the solutions."""
        self.phi = self.x = None

    def check(self, objective: Objective) -> None:
        """Check that the solutions have the shape, dtype and device of these tasks.

        Raises:
            ValueError: the number of tasks or parameters, dtype or device differ.
            RuntimeError: the call is being recorded.
        """
        if is_recording():
            raise RuntimeError("a call of adapt with warm_start cannot be recorded")
        if self.phi is None:
            return
        layout, shape = objective.layout, (objective.tasks, objective.layout.dim)
        if self.phi.shape != shape or (self.phi.dtype, self.phi.device) != (
            layout.dtype, layout.device,
        ):  # fmt: skip
            raise ValueError(
                f"warm_start has solutions {list(self.phi.shape)} {self.phi.dtype} on "
                f"{self.phi.device}, but the tasks need {list(shape)} {layout.dtype} on "
                f"{layout.device}: use one WarmStart for each set of tasks, or reset() it"
            )


def start_at(phi: Tensor, theta: Tensor) -> Tensor:
    """phi [B, D], with theta [D] in the rows that are not finite."""
    return torch.where(phi.isfinite().all(1, keepdim=True), phi, theta)
