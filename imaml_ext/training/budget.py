"""The length of a training, and how much of it has been spent."""

from imaml_ext._checks import check_integer, check_range


class Budget:
    """The length of a training: it ends at the first limit that is reached.

    A `Trainer` keeps it up to date. Learning-rate schedules and loops read `progress`.

    Args:
        steps: limit on the meta-steps; None: no limit.
        minutes: limit on the training time, over all runs of the training; 0: no limit.

    Attributes:
        progress: 0 at the start, at least 1 at the end; stays 0 without a limit.

    Raises:
        TypeError: `steps` is not an integer, or `minutes` not a number.
        ValueError: `steps` is below 1, or `minutes` is negative or not finite.
    """

    def __init__(self, steps: int | None = None, minutes: float = 0.0) -> None:
        if steps is not None:
            check_integer("steps", steps, minimum=1)
        check_range("minutes", minutes, "[0, inf)")
        self.steps = steps
        self.minutes = minutes
        self.progress = 0.0

    def update(self, *, steps: int, seconds: float) -> None:
        """Set what has been spent since the start of the training."""
        of_steps = steps / self.steps if self.steps is not None else 0.0
        of_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        self.progress = max(of_steps, of_time)
