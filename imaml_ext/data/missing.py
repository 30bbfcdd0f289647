"""The error for a data set that is not on disk."""

from typing import Any


class MissingDataError(FileNotFoundError):
    """A data set was not found.

    Attributes:
        expected: the message without its remedy.
        remedy: names arguments of the loader.
    """

    def __init__(self, expected: str, remedy: str) -> None:
        super().__init__(f"{expected}; {remedy}")
        self.expected, self.remedy = expected, remedy

    def __reduce__(self) -> Any:
        return type(self), (self.expected, self.remedy)
