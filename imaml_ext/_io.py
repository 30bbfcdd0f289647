"""Atomic writes of files, and locks on folders."""

import glob
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary file in the same folder, sync it, and rename it to `path`.

    After a crash at any moment, or on a full disk, `path` is as it was before.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}")
    with named_in_errors(path):
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
            os.fsync(folder)  # makes the rename durable
        finally:
            os.close(folder)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that has none, such as those of `write` and `close`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_unfinished(path: str | Path) -> None:
    """Remove temporary files of `path` whose writers were killed. The caller holds the lock."""
    path = Path(path)
    for temporary in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Create the folder and lock it against other processes; a lock ends with its process.

    Args:
        wait: block until the lock is free.

    Raises:
        OSError: another process holds the lock, or the folder cannot be created or written to.
    """
    # Imported late: it imports many modules that `import imaml_ext` does not need.
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{folder} is not a folder") from None
    lock = FileLock(folder / ".lock", blocking=wait)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"another process is using {folder}") from None
    try:
        yield
    finally:
        lock.release()


def _prefix(path: Path) -> str:
    return f".{path.name}.unfinished-"
