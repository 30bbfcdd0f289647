"""What the benchmarks share: timing in turn, copy bandwidth, results that say where they are from.

Implementations are timed one after the other, round by round (A B C A B C ...), so that a noisy
machine disturbs all alike; `prepare` runs untimed before each call.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Implementation = Callable[[], Any]
Timing = dict[str, float]


def parser(question: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--json", type=Path, help="write the results to this file")
    return options


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    implementations: dict[str, Implementation],
    prepare: Callable[[], None],
    device: torch.device,
    rounds: int,
) -> dict[str, Timing]:
    """Seconds per call of each implementation: median, min and max over the rounds."""
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    for round_number in range(-2, rounds):  # two rounds to warm up
        for name, call in implementations.items():
            prepare()
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_number >= 0:
                samples[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for name, s in samples.items()
    }


def check_agreement(
    implementations: dict[str, Implementation], prepare: Callable[[], None], tolerance: float
) -> None:
    """Every result against the first one's, relative in norm; exits where they differ."""
    want = None
    for name, call in implementations.items():
        prepare()
        got = call().double()
        want = got if want is None else want
        difference = ((got - want).norm() / want.norm()).item()
        if not difference <= tolerance:
            sys.exit(f"{name} differs by {difference:.1e} (tolerance {tolerance:.0e}): not timed")


def copy_bandwidth(total_bytes: int, device: torch.device, rounds: int) -> float:
    """Bytes per second that `copy_` moves between two halves of `total_bytes`.

    A CPU reads a cache line before it overwrites it, so a copy moves three bytes for each byte
    copied, where an update in place moves two; a GPU moves two in both.
    """
    source = torch.rand(total_bytes // 8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turn(
        {"copy": lambda: target.copy_(source)}, lambda: None, device, max(rounds, 20)
    )
    moved = (3 if device.type == "cpu" else 2) * source.numel() * source.element_size()
    return moved / timing["copy"]["median"]


def report(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written {path}")
