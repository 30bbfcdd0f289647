"""Logs of a training: a file of JSON lines, or TensorBoard."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imaml_ext._io import named_in_errors, write_atomically

Record = dict[str, float]
Log = Callable[[str, Record], None]  # called with "train" or "val", and the record


@contextmanager
def json_lines(
    path: str | Path, history: Sequence[Record], validation: Sequence[Record]
) -> Iterator[Log]:
    """A log with one JSON object per line: {"split": "train", "step": 1, "loss": ...}.

    Non-finite values are null. The file is rewritten from the records so far, which drops lines
    that an interrupted run wrote after its last checkpoint.

    Args:
        path: the file to write.
        history, validation: records so far, from a `Trainer`.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    past = [("train", record) for record in history] + [("val", record) for record in validation]
    past.sort(key=lambda line: line[1]["step"])  # stable: a step comes before its validation
    text = "".join(_line(split, record) for split, record in past)
    write_atomically(path, lambda file: file.write(text.encode()))
    with path.open("ab", buffering=0) as file:  # a line is written at once, or fails at once

        def log(split: str, record: Record) -> None:
            line = _line(split, record).encode()
            with named_in_errors(path):
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield log


def summary_writer() -> Any:
    """TensorBoard's class.

    Raises:
        ValueError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter


@contextmanager
def tensorboard(folder: str | Path, steps: int) -> Iterator[Log]:
    """A TensorBoard log of scalars such as "train/loss"; events after step `steps` are purged.

    Args:
        folder: the folder of TensorBoard's files.
        steps: number of meta-steps made so far.

    Raises:
        ValueError: the package tensorboard is not installed.
    """
    with summary_writer()(str(folder), purge_step=steps + 1) as writer:

        def log(split: str, record: Record) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(f"{split}/{name}", value, int(record["step"]))

        yield log


def _line(split: str, record: Record) -> str:
    values: dict[str, Any] = {
        name: value if math.isfinite(value) else None for name, value in record.items()
    }
    return json.dumps({"split": split, **values}) + "\n"
