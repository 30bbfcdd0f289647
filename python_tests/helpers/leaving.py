"""Processes that meet, reduce, and end at once: do they end well?

    python leaving.py TRIALS [kept]

In each trial 3 forks of this process share a group of gloo, whose threads are slowed down: one that
has to let go of a tensor while Python ends aborts its process. With "kept" something still refers
to the group then, to see that it happens. Prints one JSON object: how many ended, and how many of
them not well.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from imaml_ext.training.distributed import process_group

SIZE = 3
STORE = """
import sys
import torch.distributed as dist
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
kept = []


def reduce(keep):
    with process_group(torch.device("cpu")) as group:
        dist.all_reduce(torch.ones(3), group=group)
        slow_down("pt_gloo_runloop")
        for _ in range(5):
            dist.all_reduce(torch.ones(2000), group=group)
        if keep:
            kept.append(group)


def slow_down(name):
    """Threads of this name run where no others want to."""
    threads = [
        t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text() == name + "\n"
    ]
    assert threads
    for thread in threads:
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def leave(trials, keep):
    """The exit statuses. A process of its own holds the store, as torchrun does."""
    with subprocess.Popen(
        [sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as store:
        os.environ |= {
            "MASTER_ADDR": "localhost", "MASTER_PORT": store.stdout.readline().strip(),
            "TORCHELASTIC_RUN_ID": "leaving", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(SIZE),
        }  # fmt: skip
        ends = []
        for _ in range(trials):
            children = []
            for rank in range(SIZE):
                child = os.fork()
                if child == 0:
                    signal.alarm(60)  # where another one failed
                    os.environ["RANK"] = str(rank)
                    reduce(keep)
                    sys.exit()
                children.append(child)
            ends += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        store.stdin.close()
    return ends


if __name__ == "__main__":
    ends = leave(int(sys.argv[1]), "kept" in sys.argv[2:])
    print(json.dumps({"ended": len(ends), "not well": sum(end != 0 for end in ends)}))
