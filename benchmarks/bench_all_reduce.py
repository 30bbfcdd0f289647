"""How long does the all-reduce of a meta-step take, for different numbers of parameters?

    torchrun --standalone --nproc-per-node 2 bench_all_reduce.py --json results/all_reduce.json

Compares `average`, as `Trainer` calls it for gradients of D numbers, with the all-reduce alone.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from harness import parser, provenance, report, synchronize

from imaml_ext.training.distributed import average, own_device, process_group, rank

DIMS = [1_761, 113_221, 1_000_000, 10_000_000]


def medians(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list:
    """Median seconds of each call, timed in turn. All processes start each call together."""
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 3):
        for call, taken in zip(calls.values(), samples, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call()
            synchronize(device)
            if number >= 3:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]


def main() -> None:
    chosen = parser(__doc__).parse_args()
    device = own_device(torch.device(chosen.device))
    with process_group(device) as group:
        if group is None:
            raise SystemExit("run this script with torchrun")
        rows = []
        for dim in DIMS:
            gradients = {"theta": torch.randn(dim, device=device)}
            summary = {
                "loss": torch.ones((), dtype=torch.float64, device=device),
                "failed": torch.zeros((), dtype=torch.float64, device=device),
            }
            bare = torch.randn(dim + 3, device=device)
            calls = {
                "average": lambda g=gradients, s=summary: average(g, s, 8, group),
                "all_reduce": lambda b=bare: dist.all_reduce(b.zero_(), group=group),
            }
            rows.append([dim, *medians(calls, chosen.rounds, device)])
        if rank(group) == 0:
            for dim, ours, reduced in rows:
                print(f"D={dim:9d}: {1e3 * ours:8.3f} ms, all-reduce alone {1e3 * reduced:8.3f} ms")
            settings = {"processes": group.size(), "backend": dist.get_backend(group)}
            report({**provenance("all_reduce", device, settings), "rows": rows}, chosen.json)


if __name__ == "__main__":
    main()
