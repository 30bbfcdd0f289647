"""The error for a data set that is not on disk."""


class MissingDataError(FileNotFoundError):
    """A data set was not found.

    Attributes:
        expected: the message without its remedy, which names arguments of the loader.
    """

    def __init__(self, expected: str, remedy: str) -> None:
        super().__init__(f"{expected}; {remedy}")
        self.expected = expected
