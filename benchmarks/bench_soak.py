"""Does a long training leak memory or slow down?

Runs meta-steps of the sinusoid as `imaml-ext train` does. After every `--block` steps it measures
the process's resident memory and the median time of a step. An autograd graph that is kept by
accident would add kilobytes per step; the history of records adds a few hundred bytes.
"""

import statistics
import time

import torch
from harness import parser, provenance, report, synchronize

from imaml_ext.experiments.build import build
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.reproduce.memory import release_free_memory, resident_bytes


def resident() -> int:
    release_free_memory()
    return resident_bytes("VmRSS")


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(rounds=2000)
    options.add_argument("--block", type=int, default=200, help="meta-steps per block")
    options.add_argument(
        "--warm-up", type=int, default=100, help="meta-steps before the first block"
    )
    options.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    trainer = build(PRESETS["sinusoid"], device=device).trainer(compile=chosen.compile)
    for _ in range(chosen.warm_up):
        trainer.step()
    start, blocks = resident(), []
    while trainer.steps < chosen.warm_up + chosen.rounds:
        samples = []
        for _ in range(chosen.block):
            begun = time.perf_counter()
            trainer.step()
            synchronize(device)
            samples.append(time.perf_counter() - begun)
        blocks.append(
            {
                "steps": trainer.steps,
                "resident": resident(),
                "seconds": statistics.median(samples),
            }
        )
        print(
            f"{trainer.steps:6d} steps: {blocks[-1]['resident'] / 2**20:.1f} MiB, "
            f"{1e3 * blocks[-1]['seconds']:.2f} ms per step"
        )
    growth = (blocks[-1]["resident"] - start) / chosen.rounds
    half = len(blocks) // 2
    early, late = (
        statistics.median(block["seconds"] for block in part)
        for part in (blocks[:half], blocks[half:])
    )
    print(
        f"{growth:.0f} bytes per step; time of the second half over the first: {late / early:.3f}"
    )
    settings = {
        "dataset": "sinusoid", "steps": chosen.rounds, "warm_up": chosen.warm_up,
        "block": chosen.block, "compiled": chosen.compile,
    }  # fmt: skip
    report(
        {
            **provenance("soak", device, settings),
            "resident_at_start": start,
            "blocks": blocks,
            "bytes_per_step": growth,
            "late_over_early": late / early,
        },
        chosen.json,
    )


if __name__ == "__main__":
    main()
