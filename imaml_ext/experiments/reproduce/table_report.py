"""A table as Markdown and plots, from its records alone."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from imaml_ext._io import write_atomically
from imaml_ext.experiments.cells import COLUMNS, ROWS, TABLES, cell, kept_as
from imaml_ext.experiments.plots import panels, save
from imaml_ext.experiments.reproduce.study import Record

_VARIANTS = {"ours": "random weights", "features": "from features"}  # where a training starts


def draw(table: str, records: list[Record], folder: Path) -> list[Path]:
    """Plot the learning curves of each column, and write the table's section of README.md."""
    written = []
    for column in TABLES[table].columns:
        trained = [r for r in records if r["column"] == column and "accuracy" in r]
        if any(record["curve"] for record in trained):
            written.append(_draw_column(trained, folder / f"{table}-{column}.png"))
    readme = folder / "README.md"
    if any("accuracy" in record for record in records):
        write_section(readme, f"{table} overview", overview(table, records))
    write_section(readme, table, markdown(table, records, folder))
    return [*written, readme]


def _draw_column(records: list[Record], path: Path) -> Path:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    figure, axes = panels(2, width=6.75, sharey=True)
    by_tasks, by_minutes = axes
    for axis in axes:
        axis.set_prop_cycle(color=colormaps["tab20"](range(20)))
        axis.grid(alpha=0.3)
    published: dict[str, tuple[float, Any]] = {}  # by row: the error, the color of the first curve
    for record in records:
        if record["curve"]:
            steps, seconds, accuracy = zip(*record["curve"], strict=True)
            tasks = [step * record["config"]["tasks"] for step in steps]
            begin = record.get("start", {}).get("seconds", 0.0)  # when its features were ready
            minutes = [(begin + s) / 60 for s in seconds]
            errors = [100 - a for a in accuracy]
            (curve,) = by_tasks.loglog(tasks, errors, ".-", label=_label(record, records))
            by_minutes.semilogy(minutes, errors, ".-")
            if record["published"]:
                error = 100 - record["published"][0]
                published.setdefault(record["row"], (error, curve.get_color()))
    for row, (error, color) in published.items():
        text = f"{ROWS[row].label}, published (test classes)"
        for axis in axes:
            axis.axhline(error, linestyle="--", linewidth=1, color=color, label=text)
    with_features = any("start" in record for record in records if record["curve"])
    by_tasks.set(xlabel="tasks seen" + ", without those of the features" * with_features)
    by_tasks.set(ylabel="error on validation classes (%)")
    by_minutes.set(xlabel="minutes of training" + ", with those of the features" * with_features)
    for axis, digits in ((by_tasks.xaxis, (1, 3)), (by_tasks.yaxis, (1, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=digits))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")
    handles, labels = by_tasks.get_legend_handles_labels()
    figure.set_layout_engine("constrained")
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / 3))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return save(figure, path)


def _label(record: Record, records: list[Record]) -> str:
    """The method, and whatever else distinguishes the record from the others."""
    text = ROWS[record["row"]].label
    same = [r for r in records if r["row"] == record["row"]]
    if record["variant"] != "ours":
        text += f", {_VARIANTS.get(record['variant'], record['variant'])}"
    if len({_length(r) for r in same}) > 1:
        text += f", {record['seconds'] / 60:.0f} min"
    if len({r["seed"] for r in same if _but_seed(r) == _but_seed(record)}) > 1:
        text += f", seed {record['seed']}"
    return text


def _length(record: Record) -> tuple[float, int]:
    return record["config"]["minutes"], record["config"]["meta_steps"]


def _but_seed(record: Record) -> tuple[Any, ...]:
    """What records that differ only in the seed have in common."""
    return record["row"], record["variant"], *_length(record)


def overview(table: str, records: list[Record]) -> str:
    """Published and measured accuracies of all columns: the longest training of each variant."""
    columns = TABLES[table].columns
    headings = ["method", "", *("{way}-way {shot}-shot".format(**COLUMNS[c]) for c in columns)]
    lines = [headings, ["---"] * len(headings)]
    for row in ROWS:
        of_row = [r for r in records if r["row"] == row and "accuracy" in r]
        own = []
        if published := TABLES[table].published.get(row):
            own.append(["published", *("{:g} ± {:g}".format(*figures) for figures in published)])
        for variant in dict.fromkeys(r["variant"] for r in of_row):
            cells = []
            for column in columns:
                runs = [r for r in of_row if (r["column"], r["variant"]) == (column, variant)]
                longest = max(runs, key=lambda r: (r["seconds"], -r["seed"]), default=None)
                cells.append(_overview_cell(longest) if longest else "")
            own.append([_VARIANTS.get(variant, variant), *cells])
        lines += [[ROWS[row].label * (k == 0), *line] for k, line in enumerate(own)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _overview_cell(record: Record) -> str:
    tasks = record["meta_steps"] * record["config"]["tasks"]
    text = f"**{_interval(record, '')}**<br>{_minutes(record)} min"
    return f"{text}, {tasks:,} tasks" if tasks else text


def markdown(table: str, records: list[Record], folder: Path) -> str:
    """The table's section: measured and published accuracies, then the cells not trained.

    Its commands find the models in `folder` from the current folder.
    """
    parts = [f"## {TABLES[table].title}\n"]
    for column in TABLES[table].columns:
        of_column = [r for r in records if r["column"] == column]
        trained = [r for r in of_column if "accuracy" in r]
        parts.append("### {way}-way {shot}-shot\n".format(**COLUMNS[column]))
        if trained:
            if any(record["curve"] for record in trained):
                parts.append(f"![Learning curves]({table}-{column}.png)\n")
            parts.append(_trained(trained))
            parts += _over_seeds(trained)
            parts += _extrapolations(table, column, trained)
            parts.append(_origin(table, column, trained, folder))
        rows = TABLES[table].rows(column, "ours")
        missing = [row for row in rows if not any(r["row"] == row for r in trained)]
        if missing:
            parts.append(_missing(table, column, missing, of_column))
    return "\n".join(parts)


def _trained(records: list[Record]) -> str:
    rows = [_row(record, _label(record, records)) for record in records]
    headings = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [headings, ["---"] * len(headings)]
    lines += [[row[name] for name in headings] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(record: Record, method: str) -> dict[str, str]:
    config = record["config"] | record["test"]
    steps = record["adaptation_steps"]
    adaptation = f"{steps} step" if steps == 1 else f"{steps} steps"
    if config["inner"] == "nesterov":
        adaptation = f"{steps} Nesterov steps"
    other = _interval(record, "no_proximal_")
    if config["method"] == "ridge-head":
        adaptation = "ridge regression"
        if config.get("network") == "wide":
            adaptation += ", running statistics"
    elif config["method"] == "imaml" and config["eval_proximal"]:
        adaptation += f", lam {config['lam']:g}"
    elif config["method"] == "imaml":
        adaptation += ", without lam"
        other = f"with lam {config['lam']:g}: {_interval(record, 'proximal_')}"
    return {
        "method": method,
        "accuracy, %": f"**{_interval(record, '')}**",
        "published, %": "{:g} ± {:g}".format(*record["published"]) if record["published"] else "",
        "support statistics, %": _interval(record, "support_"),
        "without lam, %": other,
        "validation, %": _interval(record, "val_"),
        "meta-steps": str(record["meta_steps"]),
        "minutes": _minutes(record),
        "adaptation": adaptation,
    }


def _minutes(record: Record) -> str:
    """Of training, after those of the features that it started from."""
    own = f"{record['seconds'] / 60:.0f}"
    return f"{record['start']['seconds'] / 60:.0f} + {own}" if "start" in record else own


def _interval(record: Record, prefix: str) -> str:
    if f"{prefix}accuracy" not in record:
        return ""
    return f"{record[f'{prefix}accuracy']:.2f} ± {record[f'{prefix}ci95']:.2f}"


def _over_seeds(records: list[Record]) -> list[str]:
    """A paragraph for each training that was repeated with other seeds."""
    lines = []
    for common in dict.fromkeys(_but_seed(r) for r in records):
        runs = [r for r in records if _but_seed(r) == common]
        if len(runs) > 1:
            accuracies = [run["accuracy"] for run in runs]
            support = np.mean([run["support_accuracy"] for run in runs])
            name = _label(runs[0], [r for r in records if r["seed"] == runs[0]["seed"]])
            lines.append(
                f"{name}: {np.mean(accuracies):.2f}% on average over {len(runs)} seeds, which "
                f"share the test tasks (standard deviation {np.std(accuracies, ddof=1):.2f}; "
                f"{support:.2f}% with support statistics).\n"
            )
    return lines


def _extrapolations(table: str, column: str, records: list[Record]) -> list[str]:
    """A paragraph for each method that was trained from random weights for several lengths.

    Only for those that the paper has trained on the same data, for a number of tasks that it gives.
    """
    lines = []
    trained = [r for r in records if r["variant"] == "ours" and r["accuracy"] < 100]
    for row in TABLES[table].rows(column, "paper"):
        runs = [r for r in trained if r["row"] == row and r["published"]]
        lengths = {run["meta_steps"] for run in runs}
        if len(lengths) > 1 and max(lengths) >= 3 * min(lengths):
            paper = cell(table, column, row, "paper").train
            tasks = paper.meta_steps * paper.tasks
            low, middle, high = (100 * (1 - error) for error in extrapolated(runs, tasks)[::-1])
            lines.append(
                f"{_label(runs[0], runs[:1])}: {middle:.1f}% ({low:.1f} to {high:.1f}) after the "
                f"paper's {tasks:,} tasks, if the error follows a power law in the number of tasks "
                f"(fitted to {len(runs)} training runs). The interval reflects only the number of "
                "test tasks.\n"
            )
    return lines


def extrapolated(runs: list[Record], at_tasks: int) -> tuple[float, float, float]:
    """The error after `at_tasks` tasks: lower end of the 95% interval, value, upper end.

    Fits log error to log tasks by least squares, weighted by the standard errors of the tests.
    """
    tasks = np.log([run["meta_steps"] * run["config"]["tasks"] for run in runs])
    error = np.array([1 - run["accuracy"] / 100 for run in runs])
    spread = np.array([run["ci95"] / 196 for run in runs]) / error
    design = np.stack([np.ones_like(tasks), tasks - math.log(at_tasks)], 1) / spread[:, None]
    expected, _ = np.linalg.lstsq(design, np.log(error) / spread, rcond=None)[0]
    half = 1.96 * math.sqrt(np.linalg.inv(design.T @ design)[0, 0])
    low, middle, high = np.exp([expected - half, expected, expected + half])
    return float(low), float(middle), float(high)


def _origin(table: str, column: str, records: list[Record], folder: Path) -> str:
    """The provenance of the figures."""

    def all_of(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    best: dict[str, Record] = {}  # by name of the model
    for record in sorted(records, key=lambda record: -record["val_accuracy"]):
        if record["meta_steps"]:
            best.setdefault(kept_as(table, column, record["row"]), record)
    kept = []
    for name, record in best.items():
        model = shlex.quote(str(folder / "models" / f"{name}.pt"))
        kept.append(f"{_label(record, records)}: `imaml-ext eval {model} --data FOLDER`")
    sources = [record["source"] for record in records]
    commits = all_of([s["commit"] for s in sources if s["commit"]])  # "" outside of git
    commit = f"commit {commits}; " if commits else ""
    return (
        f"On {all_of([str(r['test_tasks']) for r in records])} test tasks, seed "
        f"{all_of([str(r['seed']) for r in records])}; "
        f"{all_of([s['device'] for s in sources])}, "
        f"{all_of([str(s['threads']) for s in sources])} thread(s); torch "
        f"{all_of([s['torch'] for s in sources])}; {commit}"
        f"{all_of([s['date'][:10] for s in sources])}. "
        "Commands: "
        + all_of([f"`{s['command']}`" for s in sources])
        + ".\n"
        + f"\nModels, the best on validation classes: {'; '.join(kept)}.\n" * bool(kept)
    )


def _missing(table: str, column: str, rows: list[str], records: list[Record]) -> str:
    lines = ["Not trained:\n"]
    for row in rows:
        text = f"- {ROWS[row].label}"
        if published := cell(table, column, row).published:
            text += " (published: {:g} ± {:g} %)".format(*published)
        for record in records:
            if record["row"] == row:
                text += ": " + (record.get("failed") or _would_take(record))
        lines.append(text)
    return "\n".join(lines) + "\n"


def _would_take(record: Record) -> str:
    each = record["seconds"] / record["meta_steps"]
    one = cell(record["table"], record["column"], record["row"], record["variant"])
    return (
        f"{each:.1f} s for a meta-step of {record['config']['tasks']} tasks on "
        f"{record['source']['device']}, {record['source']['threads']} thread(s), so "
        f"{one.train.meta_steps:,} would take {each * one.train.meta_steps / 3600:.0f} hours"
    )


def write_section(path: Path, name: str, text: str) -> None:
    """Replace the text between the marks of `name` in a Markdown file, or append it."""
    begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->\n"
    section = begin + text + end
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole, found = re.subn(f"{begin}.*?{end}", lambda _: section, before, flags=re.DOTALL)
    if not found:
        whole = f"{before}\n{section}" if before else section
    write_atomically(path, lambda file: file.write(whole.encode()))
