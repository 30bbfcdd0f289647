"""Kill and resume a training repeatedly with SIGKILL, then let it finish.

    python killing.py FOLDER SEED KILLS ARGUMENTS...

Each child is a fork of this process, which has already imported torch; it runs `imaml-ext train`
with ARGUMENTS. Some are killed before they train, some while they write a checkpoint, after a
random number of bytes, and most at a random moment within a few meta-steps. Prints one JSON object:
the number of kills of each kind.
"""

import io
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import imaml_ext.training.checkpoint
from imaml_ext.cli import main

KILLED = -signal.SIGKILL


def train(folder, arguments, prepare=lambda: None):
    """Fork a child that trains, and exits with the status of the command; return its id."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        prepare()
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        status = 1
        try:
            status = main(["train", "--out", str(folder), *resume, *arguments])
        finally:
            os._exit(status)
    return child


def has_exited(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def exit_status(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def die_in_a_write(number, fraction):
    """Kill this process in its `number`-th write of a checkpoint, after this fraction of it."""
    write_atomically, left = imaml_ext.training.checkpoint.write_atomically, number

    def write_or_die(path, write):
        nonlocal left
        left -= 1
        write_atomically(path, write if left else partly(write))

    def partly(write):
        def write_and_die(file):
            whole = io.BytesIO()
            write(whole)
            file.write(whole.getvalue()[: int(fraction * len(whole.getvalue()))])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        return write_and_die

    imaml_ext.training.checkpoint.write_atomically = write_or_die


def kill_repeatedly(folder, seed, kills, arguments):
    generator, kinds = random.Random(seed), Counter()
    for number in range(kills):
        before = log_written(folder)
        if number % 5 == 4:
            kind = "in a write"
            die = partial(die_in_a_write, generator.randint(1, 4), generator.random())
            child = train(folder, arguments, die)
        else:
            kind = "before training" if generator.random() < 0.1 else "at any moment"
            child = train(folder, arguments)
            if kind == "at any moment":
                for _ in range(generator.randint(1, 8)):  # about this many meta-steps
                    while log_written(folder) == before and not has_exited(child):
                        time.sleep(0.0005)
                    before = log_written(folder)
            time.sleep(generator.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        status = exit_status(child)
        unfinished = list(folder.glob(".checkpoint.pt.unfinished-*"))
        assert status == KILLED, f"{kind}: exited with {status} before it was killed"
        assert len(unfinished) <= 1, "a resumed run left an unfinished file"
        assert unfinished or kind != "in a write"
        kinds[kind] += 1
        kinds["with an unfinished checkpoint"] += len(unfinished)
    assert exit_status(train(folder, arguments)) == 0
    return kinds


def log_written(folder):
    """The modification time of the log, which a training writes first, in ns; None without one."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else None


if __name__ == "__main__":
    folder, seed, kills, *arguments = sys.argv[1:]
    print(json.dumps(kill_repeatedly(Path(folder), int(seed), int(kills), arguments)))
