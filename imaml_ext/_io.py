"""Files that are there whole or not at all, and folders that one process writes to."""

import fcntl
import glob
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it, and rename it to `path`.

    A crash at any moment, or a full disk, leaves what was there before.

    Raises:
        OSError: as the file system does, with the path. Nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_in_errors(path):
        _write(path, write)


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """An OSError says which file it is about; those of `write` and `close` do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_unfinished(path: str | Path) -> None:
    """Remove what writers of `path` left behind that were killed. There must be none at work."""
    path = Path(path)
    for temporary in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Make the folder, and hold it against other processes; a lock dies with its process.

    Args:
        wait: until it is free.

    Raises:
        OSError: another process holds it, or the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with named_in_errors(lock), lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BlockingIOError(f"another process is at work in {folder}") from None
        yield


def _prefix(path: Path) -> str:
    return f".{path.name}.unfinished-"
