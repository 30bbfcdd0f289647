"""Kill a training with SIGKILL again and again, resuming it each time, then let it end.

    python killing.py FOLDER SEED KILLS ARGUMENTS...

Each child is a fork of this process, which has torch loaded already; it trains and saves as
ARGUMENTS of `imaml-ext train` say. Some die before they train, some inside a checkpoint's write,
after a random number of its bytes, and most at a random moment between a few meta-steps. Prints one
JSON object: how many died in each of these ways.
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
    """In a child: its exit status is the command's."""
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


def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_of(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def die_in_a_write(number, share):
    """From now on: this process does, in this write of a checkpoint, with this share written."""
    write_atomically, left = imaml_ext.training.checkpoint.write_atomically, number

    def write_or_die(path, write):
        nonlocal left
        left -= 1
        write_atomically(path, write if left else partly(write))

    def partly(write):
        def write_and_die(file):
            whole = io.BytesIO()
            write(whole)
            file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        return write_and_die

    imaml_ext.training.checkpoint.write_atomically = write_or_die


def kill_again_and_again(folder, seed, kills, arguments):
    generator, ways = random.Random(seed), Counter()
    for number in range(kills):
        before = log_written(folder)
        if number % 5 == 4:
            way = "in a write"
            die = partial(die_in_a_write, generator.randint(1, 4), generator.random())
            child = train(folder, arguments, die)
        else:
            way = "before training" if generator.random() < 0.1 else "at any moment"
            child = train(folder, arguments)
            if way == "at any moment":
                for _ in range(generator.randint(1, 8)):  # about as many meta-steps
                    while log_written(folder) == before and not has_ended(child):
                        time.sleep(0.0005)
                    before = log_written(folder)
            time.sleep(generator.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        status = end_of(child)
        unfinished = list(folder.glob(".checkpoint.pt.unfinished-*"))
        assert status == KILLED, f"{way}: it ended with {status} before it was killed"
        assert len(unfinished) <= 1, "a resumed run left another's file"
        assert unfinished or way != "in a write"
        ways[way] += 1
        ways["of all, with a checkpoint half written"] += len(unfinished)
    assert end_of(train(folder, arguments)) == 0
    return ways


def log_written(folder):
    """When, in nanoseconds: a training begins by writing its log."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else None


if __name__ == "__main__":
    folder, seed, kills, *arguments = sys.argv[1:]
    print(json.dumps(kill_again_and_again(Path(folder), int(seed), int(kills), arguments)))
