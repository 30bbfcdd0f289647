"""Processes that exit right after an all-reduce: does gloo abort them?

    python leaving.py TRIALS [kept]

In each trial 3 forks of this process form a gloo group, whose threads are slowed down: a thread
that releases a tensor while Python exits aborts its process. With "kept" a global variable refers
to the group, to show that it happens. Prints one JSON object: how many processes exited, and how
many of them failed.
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
    """Let threads of this name run only when nothing else does."""
    threads = [
        t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text() == name + "\n"
    ]
    assert threads
    for thread in threads:
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def leave(trials, keep):
    """Run the trials and return the exit statuses. A separate process holds the store."""
    with subprocess.Popen(
        [sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as store:
        os.environ |= {
            "MASTER_ADDR": "localhost", "MASTER_PORT": store.stdout.readline().strip(),
            "TORCHELASTIC_RUN_ID": "leaving", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(SIZE),
        }  # fmt: skip
        statuses = []
        for _ in range(trials):
            children = []
            for rank in range(SIZE):
                child = os.fork()
                if child == 0:
                    signal.alarm(60)  # in case another one failed
                    os.environ["RANK"] = str(rank)
                    reduce(keep)
                    sys.exit()
                children.append(child)
            statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        store.stdin.close()
    return statuses


if __name__ == "__main__":
    statuses = leave(int(sys.argv[1]), "kept" in sys.argv[2:])
    print(json.dumps({"exited": len(statuses), "failed": sum(s != 0 for s in statuses)}))
