"""Writes benchmarks/README.md from benchmarks/results/*.json: `python benchmarks/tables.py`."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

HEADER = """# Benchmarks

Written by `python benchmarks/tables.py` from `results/*.json`, which also hold minima and maxima.
Implementations were timed in turn in one process, after their results were found to agree; times
are medians. On a noisy machine trust the ratios. To run one again, take the command beside it, in
this folder, with `--device cuda` if you like: nothing here has been measured on a GPU yet.
"""

CG = """
## Conjugate gradient: the vector work of {iterations} iterations, B={tasks}, D={dim}, {dtype}

| implementation | ms | fused is faster by | share of copy bandwidth ({copy:.0f} GB/s) |
| --- | --- | --- | --- |
"""

META = """
## Complete meta-gradients: {inner_steps} inner steps, {cg_steps} CG steps, float32

| workload | tasks | D | imaml_ext, ms | per-task loop, ms | faster by | from |
| --- | --- | --- | --- | --- | --- | --- |
"""

INNER = """
## Inner solvers: gradients until every task's gradient norm is 1e-3 of its start

Omniglot 5-way 1-shot, network {network}, lam {lam}, {tasks} tasks, at most {budget} steps
of gradient descent. In gradients, by time: a Hessian product {worth_hessian:.2f}, a Gauss-Newton
one {worth_ggn:.2f}, a forward pass {worth_forward:.2f}. The residual is the median, of its start.

| solver | arrived | gradients | products | forward passes | gradient-equivalents | residual | G |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def source(result: dict[str, Any]) -> str:
    return (
        f"`{result['command']}` at {result['commit']}, {result['device']}, "
        f"{result['threads']} threads, torch {result['torch']}, {result['date'][:10]}"
    )


def cg_table(result: dict[str, Any]) -> str:
    text = CG.format(**result["settings"], copy=result["copy_bandwidth"] / 1e9)
    for name, row in result["implementations"].items():
        text += (
            f"| {name} | {1e3 * row['median']:.1f} | {row['speedup_of_fused']:.1f}x "
            f"| {100 * row['share_of_copy_bandwidth']:.0f}% |\n"
        )
    return text + f"\n{source(result)}\n"


def meta_row(result: dict[str, Any]) -> str:
    settings, times = result["settings"], result["implementations"]
    ours, loop = (1e3 * times[name]["median"] for name in ("imaml_ext", "per-task loop"))
    return (
        f"| {settings['workload']} | {settings['tasks']} | {settings['dim']} | {ours:.0f} "
        f"| {loop:.0f} | {result['speedup']:.1f}x | {source(result)} |\n"
    )


def inner_table(result: dict[str, Any]) -> str:
    settings, worth = result["settings"], result["worth"]
    text = INNER.format(**settings, **{f"worth_{name}": value for name, value in worth.items()})
    for row in result["solvers"]:
        lr = f", lr {row['lr']:g}" if row["lr"] else ""
        text += (
            f"| {row['solver']}{lr} | {row['arrived']} of {settings['tasks']} | {row['gradient']} "
            f"| {row['product']} | {row['forward']} | {row['gradient_equivalents']:.0f} "
            f"| {row['residual']:.1e} | {row['objective']:.4f} |\n"
        )
    return text + f"\n{source(result)}\n"


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    text = HEADER
    for result in results:
        if result["benchmark"] == "cg":
            text += cg_table(result)
    whole = [result for result in results if result["benchmark"] == "meta_grad"]
    text += META.format(**whole[0]["settings"])
    for result in sorted(whole, key=lambda result: -result["speedup"]):
        text += meta_row(result)
    for result in results:
        if result["benchmark"] == "inner":
            text += inner_table(result)
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
