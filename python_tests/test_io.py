"""Atomic writes and locks."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imaml_ext import _io
from imaml_ext._io import locked, named_in_errors, remove_unfinished, write_atomically

PYTHON, IO = (sys.executable, "-c"), _io.__file__  # run alone, without importing torch


def test_a_file_is_written_with_its_folder(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda file: file.write(b"content"))
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "disk full")])
def test_a_write_that_fails_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_without_a_file_name_gets_one(tmp_path):
    def fail(file):
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match=r"disk full: '.*file'"):
        write_atomically(tmp_path / "file", fail)
    with pytest.raises(FileNotFoundError, match="other"), named_in_errors(tmp_path / "file"):
        (tmp_path / "other").open()


KILLED = """
import os, runpy, signal, sys
write_atomically = runpy.run_path(sys.argv[1])["write_atomically"]
def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[2], write)
"""


def test_only_the_files_of_killed_writers_are_removed(tmp_path):
    path, other = tmp_path / "a[1].pt", tmp_path / "a1.pt"
    path.write_bytes(b"old")
    for target in (path, other):
        subprocess.run([*PYTHON, KILLED, IO, str(target)], check=False)
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(path)
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".a1.pt")
    assert path.read_bytes() == b"old"


def test_a_locked_folder_is_named_and_can_be_locked_afterwards(tmp_path):
    folder = tmp_path / "new" / "folder"
    with locked(folder):
        message = f"another process is using {folder}"
        with pytest.raises(BlockingIOError, match=message), locked(folder):
            pass
        with locked(tmp_path):
            pass
    with locked(folder):
        pass


def test_a_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


HOLDS = """
import runpy, sys, time
from pathlib import Path
with runpy.run_path(sys.argv[1])["locked"](Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    with subprocess.Popen(
        [*PYTHON, HOLDS, IO, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="another process"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


WAITS = HOLDS.replace("Path(sys.argv[2])", "Path(sys.argv[2]), wait=True").replace("60", "0")


def test_a_process_can_wait_for_a_lock(tmp_path):
    with locked(tmp_path):
        waiter = subprocess.Popen(
            [*PYTHON, WAITS, IO, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(2)
    out, _ = waiter.communicate(timeout=60)
    assert (out, waiter.returncode) == ("locked\n", 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    folder = Path(tmp_path / "read-only")
    folder.mkdir(mode=0o500)
    with pytest.raises(OSError, match="read-only"), locked(folder):
        pass
