"""Shared by the benchmarks: timing in turn, checks of agreement, rooflines, provenance of results.

Implementations are timed in turn, round by round (A B C A B C ...), so that noise of the machine
affects all alike; `prepare` runs untimed before each call. cuda_timing.py has what is specific to
CUDA.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cuda_timing import Implementation, cuda_seconds
from torch import Tensor

from imaml_ext.experiments.provenance import describe_run

Implementations = dict[str, Implementation]
Timing = dict[str, float]
PEERS = {"jax": "JAX", "torchopt": "TorchOpt", "linear_operator": "linear_operator"}


def parser(question: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--json", type=Path, help="write the results to this file")
    return options


def add_without(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--without", nargs="*", default=[], metavar="TEXT",
        help="leave out the implementations whose names contain one of these",
    )  # fmt: skip


def leave_out(implementations: Implementations, without: list[str]) -> Implementations:
    """The remaining implementations, always with the first; lists the others on stderr."""
    ours = next(iter(implementations))
    kept = {}
    for name, call in implementations.items():
        if name != ours and any(text in name for text in without):
            print(f"left out, as requested: {name}", file=sys.stderr)
        else:
            kept[name] = call
    return kept


def has_peer(module: str) -> bool:
    """Whether a library to compare with is installed; if not, prints so on stderr."""
    if importlib.util.find_spec(module) is not None:
        return True
    print(
        f"left out, not installed: {PEERS[module]} (pip install '.[bench]')",
        file=sys.stderr,
    )
    return False


def jax_peer(device: torch.device) -> Any:
    """The module with the formulations in JAX; None, with a message, if they cannot run."""
    if not has_peer("jax"):
        return None
    import jax_meta_gradient

    if device.type == "cuda" and not jax_meta_gradient.has_gpu():
        print("left out, installed without CUDA: JAX", file=sys.stderr)
        return None
    return jax_meta_gradient


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Implementation, device: torch.device) -> float:
    """Seconds of one call, including what it leaves running on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


_SHORT = 0.05  # seconds
_CALLS_IN_A_TURN = 5  # of a short call
_CUDA_COPY_BYTES = 512 * 10**6


def time_in_turn(
    implementations: Implementations,
    prepare: Implementation,
    device: torch.device,
    rounds: int,
    *,
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Seconds per call of each implementation: median, min and max over the rounds.

    Short calls are repeated in a turn, and the first is not timed: the threads of the previous
    implementation may still spin, and its own may sleep. On CUDA a turn is one sample of
    `cuda_seconds`.
    """
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    latest = dict.fromkeys(implementations, math.inf)
    for round_number in range(-warm_up, rounds):
        for name, call in implementations.items():
            short, calls = latest[name] < _SHORT, 1
            if short and device.type == "cpu":
                prepare()
                call()
                calls = _CALLS_IN_A_TURN
            for _ in range(calls):
                prepare()
                if device.type == "cuda":
                    latest[name] = cuda_seconds(call, device, short=short)
                else:
                    latest[name] = seconds(call, device)
                if round_number >= 0:
                    samples[name].append(latest[name])
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for name, s in samples.items()
    }


def check_agreement(
    implementations: Implementations, prepare: Implementation, tolerance: float
) -> None:
    """Compare every result with the first one, relative in norm; exit if one differs."""
    want: Tensor | None = None
    for name, call in implementations.items():
        prepare()
        got = call().double()
        want = got.clone() if want is None else want  # the buffer may be overwritten by others
        difference = ((got - want).norm() / want.norm()).item()
        if not difference <= tolerance:
            sys.exit(f"{name} differs by {difference:.1e} (tolerance {tolerance:.0e}): not timed")


def copy_bandwidth(total_bytes: int, device: torch.device, rounds: int) -> float:
    """Bytes per second that `copy_` moves between two halves of `total_bytes`.

    A CPU reads a cache line before it overwrites it, so a copy moves three bytes per byte copied,
    and an update in place two; a GPU moves two in both cases. On CUDA the halves have at least 256
    MB, several times the cache, because the timed operands are not in the cache either.
    """
    if device.type == "cuda":
        total_bytes = max(total_bytes, _CUDA_COPY_BYTES)
    source = torch.rand(max(total_bytes // 8, 1), device=device)
    target = torch.empty_like(source)
    timing = time_in_turn(
        {"copy": lambda: target.copy_(source)}, lambda: None, device, max(rounds, 20)
    )
    moved = (3 if device.type == "cpu" else 2) * source.numel() * source.element_size()
    return moved / timing["copy"]["median"]


def matmul_rate(device: torch.device, rounds: int, *, size: int | None = None) -> float:
    """Flop/s of a product of two square float32 matrices, the maximum over the rounds."""
    size = size or (4096 if device.type == "cuda" else 1024)
    a, b = torch.rand(2, size, size, device=device)
    timing = time_in_turn({"matmul": lambda: a @ b}, lambda: None, device, max(rounds, 10))
    return 2 * size**3 / timing["matmul"]["min"]


def provenance(benchmark: str, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Common to all results: device, commit, date, and versions of the compared libraries."""
    installed = [module for module in PEERS if importlib.util.find_spec(module) is not None]
    return {
        "benchmark": benchmark,
        "device_type": device.type,
        **describe_run(device),
        "peers": {PEERS[module]: importlib.metadata.version(module) for module in installed},
        "settings": settings,
    }


def report(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {path}")
