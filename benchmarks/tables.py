"""Writes benchmarks/README.md from benchmarks/results/*.json: `python benchmarks/tables.py`.

The README's rows on a GPU too. `python benchmarks/tables.py --add OUT/bench.json` first takes over
what `.ci/gpu` has measured, one file of results/ for each benchmark.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import readme_rows

HERE = Path(__file__).parent

Result = dict[str, Any]

HEADER = """# Benchmarks

Written by `python benchmarks/tables.py` from `results/*.json`, which also hold minima and maxima.
Implementations were timed in turn in one process, after their results were found to agree; times
are medians. On a noisy machine trust the ratios. On CUDA a short time is the mean of at least 20
calls between two events; the vector work finds its operands outside the cache there, and has rows
for CUDA graphs, since launching it can take longer than doing it. To run one again, take the
command beside it, in this folder; what it compares with comes with `pip install '.[bench]'`.
"""

INNER = """
## Inner solvers: gradients until every task's gradient norm is 1e-3 of its start

Omniglot 5-way 1-shot, network {network}, lam {lam}, {tasks} tasks, at most {budget} steps
of gradient descent. In gradients, by time: a Hessian product {worth_hessian:.2f}, a Gauss-Newton
one {worth_ggn:.2f}, a forward pass {worth_forward:.2f}. The residual is the median, of its start.

| solver | arrived | gradients | products | forward passes | gradient-equivalents | residual | G |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

PACKAGE = """
## The package: what importing it adds to importing torch, and how large it is

Medians of {rounds} imports, each in a fresh process; of {installs} installs by pip, without
dependencies.

{imports}
Within a process, the CPU time of importing imaml_ext is {within_median:.1f}% of that of importing
torch just before ({within_min:.1f} to {within_max:.1f}%). Trust this one: two processes differ by
more.

{archives}"""

INSTALLS = """
## What installs where

Written by `.ci/matrix --out benchmarks/results/installs.jsonl`: for each row a fresh environment,
the install, and a training with what was installed, outside the source folder. Seconds are those of
the install, the compilation included, on a busy machine; each row's versions and build are in the
file.

{rows}
{notes}

{platforms}, {dates}
"""

TITLES: dict[str, Callable[[Result], str]] = {
    "cg": lambda s: (
        f"Conjugate gradient: the vector work of {s['iterations']} iterations, "
        f"B={s['tasks']}, D={s['dim']}, {s['dtype']}"
    ),
    "prox": lambda s: (
        f"A proximal step of {'Adam' if s['step'] == 'adam' else 'gradient descent'}, "
        f"B={s['tasks']}, D={s['dim']}, {s['dtype']}"
    ),
    "meta_grad": lambda s: (
        f"A meta-gradient: {s['workload']}, {s['tasks']} tasks, D={s['dim']}, "
        f"{s['inner_steps']} inner steps, {s['cg_steps']} CG steps, "
        f"{'TF32' if s.get('tf32') else 'float32'}"
    ),
    "memory": lambda s: (
        f"Peak memory of a meta-gradient, MiB: {s['workload']}, {s['tasks']} tasks, D={s['dim']}"
    ),
    "scaling": lambda s: f"How the time grows: {s['workload']}",
    "all_reduce": lambda s: (
        f"The all-reduce of a meta-step: {s['processes']} processes, {s['backend']}"
    ),
    "soak": lambda s: (
        f"{s['steps']} meta-steps of {s['dataset']}{', compiled' if s['compiled'] else ''}"
    ),
}
# Column title and what it is a share of, where a result has it.
SHARES = {
    "share_of_copy_bandwidth": ("copy bandwidth", "copy_bandwidth", "GB/s"),
    "share_of_matmul": ("a matrix product's rate", "matmul_rate", "Gflop/s"),
}


def source(result: Result) -> str:
    peers = "".join(f", {name} {version}" for name, version in result.get("peers", {}).items())
    return (
        f"`{result['command']}` at {result['commit']}, {result['device']}, "
        f"{result['threads']} threads, torch {result['torch']}{peers}, {result['date'][:10]}"
    )


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def times(result: Result) -> str:
    """Implementations by rising median, against the first one, which is ours."""
    rows = result["implementations"]
    ours = next(iter(rows))
    share = next((key for key in SHARES if key in rows[ours]), None)
    columns = ["implementation", "ms", f"time over {ours}'s"]
    if share is not None:
        of, rate, unit = SHARES[share]
        columns.append(f"share of {of} ({result[rate] / 1e9:.0f} {unit})")
    compiles = any("compile" in row for row in rows.values())
    columns += ["compiled in"] if compiles else []
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median"]):
        line = [f"**{name}**" if name == ours else name, f"{1e3 * row['median']:.3g}"]
        if row["median"] >= 1:
            line[1] = f"{1e3 * row['median']:.0f}"
        line.append(f"{row['median'] / rows[ours]['median']:.2f}")
        if share is not None:
            line.append(f"{100 * row[share]:.0f}%")
        if compiles:
            line.append(f"{row['compile']:.1f} s" if "compile" in row else "")
        lines.append(line)
    text = table(columns, lines)
    if result.get("tried"):
        tried = sorted(result["tried"].items(), key=lambda item: item[1])
        listed = "; ".join(
            f"{name.removeprefix('JAX, ')} {1e3 * took:.3g} ms" for name, took in tried
        )
        text += f"\nJAX's formulations, the fastest of a few calls: {listed}.\n"
    return text


def memory(result: Result) -> str:
    rows = result["implementations"]
    over_inner, over_cg = (
        list(next(iter(rows.values()))[f"over_{which}_steps"]) for which in ("inner", "cg")
    )
    columns = ["implementation"]
    columns += [f"{n} inner steps" for n in over_inner] + [f"{n} CG steps" for n in over_cg]
    lines = []
    for name, row in rows.items():
        peaks = [row["over_inner_steps"][n] for n in over_inner]
        peaks += [row["over_cg_steps"].get(n) for n in over_cg]
        lines.append([name, *("" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks)])
    settings = result["settings"]
    return table(columns, lines) + (
        f"\nOver the inner steps with {settings['cg_steps_over_inner']} CG step(s), over the CG "
        f"steps with {settings['inner_steps_over_cg']} inner step(s).\n"
    )


def scaling(result: Result) -> str:
    lines = []
    for label, points in result["series"].items():
        fitted = result["fits"][label]
        found = (
            f"size^{fitted['power']:.2f}"
            if "power" in fitted
            else f"{1e3 * fitted['start']:.1f} ms + {1e3 * fitted['each']:.2f} ms a step"
        )
        measured = ", ".join(f"{size:g}: {1e3 * time:.3g}" for size, time in points)
        lines.append([label, measured, found])
    text = table(["against", "ms", "fit"], lines)
    text += f"\nLaunches of a CG iteration: {result['launches_per_iteration']}, always.\n"
    picture = result["settings"]["picture"]
    return text if picture is None else f"{text}\n![The curves](results/{picture})\n"


def inner(result: Result) -> str:
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


def soak(result: Result) -> str:
    lines = [
        [str(b["steps"]), f"{b['resident'] / 2**20:.1f}", f"{1e3 * b['seconds']:.2f}"]
        for b in result["blocks"]
    ]
    return table(["meta-steps", "resident, MiB", "ms a step, median of the block"], lines) + (
        f"\nFrom {result['resident_at_start'] / 2**20:.1f} MiB after "
        f"{result['settings']['warm_up']} steps: {result['bytes_per_step']:.0f} bytes a step, "
        "which the history of records keeps. "
        f"The second half takes {result['late_over_early']:.3f} of the first's time.\n"
    )


def package(result: Result) -> str:
    imports, added = result["imports"], result["added"]
    text = PACKAGE.format(
        rounds=result["settings"]["rounds"],
        installs=result["settings"]["installs"],
        imports=table(
            ["", "wall time, s", "CPU time, s"],
            [
                [f"`{code}`", f"{took['wall']['median']:.2f}", f"{took['cpu']['median']:.2f}"]
                for code, took in imports.items()
            ]
            + [["added", f"{100 * added['wall']:.1f}%", f"{100 * added['cpu']:.1f}%"]],
        ),
        **{f"within_{name}": 100 * share for name, share in result["added_within"].items()},
        archives=table(
            ["archive", "MB", "installed, MB", "files", "installed in, s"],
            [
                [
                    label,
                    f"{1e-6 * archive['bytes']:.2f}",
                    f"{1e-6 * archive['installed_bytes']:.2f}",
                    str(archive["files"]),
                    f"{archive['install']['median']:.1f}",
                ]
                if "install" in archive
                else [label, f"{1e-6 * archive['bytes']:.2f}", "", "", ""]
                for label, archive in result["archives"].items()
            ],
        ),
    )
    return text + f"\n{source(result)}\n"


def installs(lines: list[Result]) -> str:
    """The last outcome of each row."""
    latest = {line["name"]: line for line in lines}
    rows, notes = [], {}
    for name, line in sorted(latest.items()):
        row, seconds = line["row"], line["seconds"].get("install")
        built = f" built with torch {row['built_with']}" if row["built_with"] else ""
        rows.append(
            [
                line.get("python", row["python"]),
                line.get("torch", row["torch"] or "none"),
                row["way"] + built + ("" if row["torch"] else ", which brings torch"),
                "CPU and CUDA" if row["kernels"] == "cuda" else "CPU",
                f"**{line['outcome']}**" if line["reason"] else line["outcome"],
                "" if seconds is None else f"{seconds:.0f}",
                line["commit"],
            ]
        )
        if line["reason"]:
            notes.setdefault(line["reason"], []).append(name)

    def distinct(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    columns = ["Python", "torch", "installed by", "kernels", "outcome", "seconds", "commit"]
    return INSTALLS.format(
        rows=table(columns, rows),
        notes="\n".join(f"- {'; '.join(names)}: {reason}" for reason, names in notes.items()),
        platforms=distinct(line["platform"] for line in latest.values()),
        dates=distinct(line["date"][:10] for line in latest.values()),
    )


def all_reduce(result: Result) -> str:
    lines = [
        [f"{d:,}", f"{1e3 * ours:.2f}", f"{1e3 * bare:.2f}"] for d, ours, bare in result["rows"]
    ]
    return table(["D", "of a meta-step, ms", "bare, of as many numbers, ms"], lines)


BODIES = {
    "cg": times,
    "prox": times,
    "meta_grad": times,
    "memory": memory,
    "scaling": scaling,
    "soak": soak,
    "all_reduce": all_reduce,
}
PAGES = {"inner": inner, "package": package}


def make(results: list[Result], matrix: list[Result] | None = None) -> str:
    """The page. Of each benchmark's setting: what was measured on the CPU, and on CUDA."""
    text = HEADER
    for benchmark, title in TITLES.items():
        settings: dict[str, dict[str, Result]] = {}
        for result in results:
            if result["benchmark"] == benchmark:
                on = settings.setdefault(title(result["settings"]), {})
                on[result.get("device_type", "cpu")] = result
        for heading, on in settings.items():
            text += f"\n## {heading}\n"
            for device_type, label in (("cpu", "CPU"), ("cuda", "CUDA")):
                if device_type in on:
                    result = on[device_type]
                    text += f"\n{label}:\n\n{BODIES[benchmark](result)}\n{source(result)}\n"
                else:
                    text += f"\n{label}: not measured.\n"
    for benchmark, page in PAGES.items():
        text += "".join(page(result) for result in results if result["benchmark"] == benchmark)
    return text + (installs(matrix) if matrix else "")


def committed(folder: Path = HERE) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]


def committed_matrix(folder: Path = HERE) -> list[Result]:
    text = (folder / "results" / "installs.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def add(merged: Path, folder: Path) -> None:
    """Split what `.ci/gpu` has merged: {"NAME.json": result}."""
    for name, result in json.loads(merged.read_text()).items():
        (folder / Path(name).name).write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None, root: Path = HERE.parent) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--add", type=Path, metavar="FILE", help="results that .ci/gpu has merged")
    chosen = options.parse_args(arguments)
    folder, readme = root / "benchmarks", root / "README.md"
    if chosen.add is not None:
        add(chosen.add, folder / "results")
    results = committed(folder)
    (folder / "README.md").write_text(make(results, committed_matrix(folder)))
    readme.write_text(readme_rows.replaced(readme.read_text(), results))


if __name__ == "__main__":
    main()
