"""Kill a training with SIGKILL again and again, resuming it each time, then let it end.

    python killing.py FOLDER SEED KILLS LONGEST ARGUMENTS...

Each child is a fork of this process, which has torch loaded already. Once it has begun to train,
and now and then before, it lives for a random time of up to LONGEST seconds; it saves as ARGUMENTS
of `imaml-ext train` say. Prints one JSON object: how often it was killed, and how often of those
while a checkpoint was being written.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from imaml_ext.cli import main


def train(folder, arguments):
    """In a child: its exit status is the command's."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        status = 1
        try:
            status = main(["train", "--out", str(folder), *resume, *arguments])
        finally:
            os._exit(status)
    return child


def kill_again_and_again(folder, seed, kills, longest, arguments):
    generator, writing = random.Random(seed), 0
    for _ in range(kills):
        before = log_written(folder)
        child = train(folder, arguments)
        end = time.monotonic() + generator.uniform(0, longest)
        if generator.random() < 0.9:  # else it may not get as far as training
            while log_written(folder) == before:
                time.sleep(0.0005)
            end = time.monotonic() + generator.uniform(0, longest)
        time.sleep(max(0.0, end - time.monotonic()))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it ended before it was killed"
        unfinished = list(folder.glob(".checkpoint.pt.unfinished-*"))
        assert len(unfinished) <= 1, "a resumed run left another's file"
        writing += len(unfinished)
    _, status = os.waitpid(train(folder, arguments), 0)
    assert status == 0
    return {"killed": kills, "while writing": writing}


def log_written(folder):
    """When, in nanoseconds: a training begins by writing its log."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else None


if __name__ == "__main__":
    folder, seed, kills, longest, *arguments = sys.argv[1:]
    counts = kill_again_and_again(Path(folder), int(seed), int(kills), float(longest), arguments)
    print(json.dumps(counts))
