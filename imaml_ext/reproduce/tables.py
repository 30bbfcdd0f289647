"""Tables 2 and 3: every method on few-shot image classification, cell by cell.

A cell is trained from its checkpoint on, if it has one, tested once, at the end, on unseen classes,
and appended as one line. A line that is there already is not measured again, so a table grows over
many short runs of the same command.
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imaml_ext.checkpoint import load_checkpoint, save_model
from imaml_ext.experiment import Experiment, build, saved_config, train_to_end
from imaml_ext.plots import pyplot, save
from imaml_ext.presets import ROWS, TABLES, Cell, Config, Table, cell
from imaml_ext.reproduce.study import Record, Settings, Study
from imaml_ext.trainer import Evaluation, evaluate

_VALIDATIONS = 8
_SIDE_TASKS = 200  # of validation, and of what is reported beside the accuracy
_TRAINED = 100  # meta-steps; a shorter run is a timing: nothing is learned, nothing is tested


def measure(table: str, settings: Settings) -> Iterator[Record]:
    known = _known(settings.out / f"{table}.jsonl")
    cells = [
        cell(table, column, row, settings.flavour)
        for column in settings.columns or TABLES[table].columns
        for row in settings.rows or _rows(table, settings.flavour)
    ]
    for one in cells:
        config = dataclasses.replace(
            one.train,
            seed=settings.seed,
            minutes=settings.minutes,
            meta_steps=settings.meta_steps or one.train.meta_steps,
        )
        if any(_of(record) == one.name and record["config"] == vars(config) for record in known):
            tqdm.write(f"{one.name}: measured already")
            continue
        record, state = _measure(one, config, settings)
        best = [_validated(r) for r in known if r["column"] == one.column]
        known.append(record)
        if _validated(record) > max(best, default=0.0):  # never by the test classes
            save_model(settings.out / "models" / f"{table}-{one.column}.pt", state)
        yield record


def _rows(table: str, flavour: str) -> list[str]:
    """Rows that have this flavour."""
    found = []
    for row in ROWS:
        try:
            cell(table, TABLES[table].columns[0], row, flavour)
        except ValueError:
            continue
        found.append(row)
    return found


def _known(lines: Path) -> list[Record]:
    if not lines.is_file():
        return []
    return [json.loads(line) for line in lines.read_text().splitlines()]


def _validated(record: Record) -> float:
    return float(record.get("val_accuracy", 0.0))


def _of(record: Record) -> str:
    """The name of the cell that a record is of."""
    return "-".join(record[key] for key in ("table", "column", "row", "flavour"))


def _measure(one: Cell, config: Config, settings: Settings) -> tuple[Record, dict[str, object]]:
    experiment = build(config, data=settings.data, device=settings.device)
    trainer = experiment.trainer()
    folder = settings.runs / f"{one.name}-seed{config.seed}"
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        before = saved_config(load_checkpoint(checkpoint), checkpoint)
        if (
            dataclasses.replace(before, minutes=config.minutes, meta_steps=config.meta_steps)
            != config
        ):
            raise ValueError(f"{checkpoint} is of other settings: move it away to train anew")
        trainer.load(checkpoint)
    timed = config.meta_steps < _TRAINED
    train_to_end(
        experiment, trainer, checkpoint, validations=0 if timed else _VALIDATIONS,
        validation_tasks=min(100, settings.tasks), name=one.name,
    )  # fmt: skip
    tested = {name: getattr(one.test, name) for name in _changed(one)}
    record = {
        "table": one.table,
        "column": one.column,
        "row": one.row,
        "flavour": one.flavour,
        "seed": config.seed,
        "meta_steps": trainer.steps,
        "seconds": trainer.seconds,
        "published": one.published,
        **({} if timed else _tested(experiment.adapting(**tested), one, settings.tasks)),
        "curve": [
            [r["step"], round(r["seconds"], 2), 100 * r["accuracy"]] for r in trainer.validation
        ],
        "config": vars(config),
        "test": tested,
    }
    state = load_checkpoint(checkpoint, training=True)
    state["config"] = json.dumps(vars(dataclasses.replace(config, **tested)))
    return record, state


def _tested(experiment: Experiment, one: Cell, tasks: int) -> Record:
    few = min(_SIDE_TASKS, tasks)
    figures = {
        "test_tasks": tasks,
        "adaptation_steps": one.test.inner_steps,
        **_percent("", _evaluate(experiment, "test", tasks)),
        **_percent("val_", _evaluate(experiment, "val", few)),
    }
    if one.test.method == "imaml":
        proximal = not one.test.eval_proximal
        other = experiment.adapting(eval_proximal=proximal)
        name = "proximal_" if proximal else "no_proximal_"
        figures |= _percent(name, _evaluate(other, "test", few))
    return figures


def _changed(one: Cell) -> list[str]:
    """What is set differently in evaluation."""
    train, test = vars(one.train), vars(one.test)
    return [name for name in train if train[name] != test[name]]


def _evaluate(experiment: Experiment, split: str, tasks: int) -> Evaluation:
    return evaluate(
        experiment.method,
        experiment.sources[split],
        experiment.metrics,
        tasks=tasks,
        support_metrics=experiment.support_metrics,
    )


def _percent(prefix: str, result: Evaluation) -> Record:
    return {
        f"{prefix}{kind}{name}": 100 * values[f"{kind}accuracy"]
        for kind in ("", "support_")
        for name, values in (("accuracy", result.mean), ("ci95", result.ci95))
    }


def select(records: list[Record]) -> list[Record]:
    """The latest record of each cell and budget, in the order of the table."""
    latest = {(_of(r), r["seed"], r["config"]["minutes"]): r for r in records}
    rows = list(ROWS)
    return sorted(latest.values(), key=lambda r: (rows.index(r["row"]), r["flavour"]))


def draw(table: str, records: list[Record], folder: Path) -> list[Path]:
    """A picture of the learning curves for each column, and the section of README.md."""
    written = []
    for column in TABLES[table].columns:
        trained = [r for r in records if r["column"] == column and "accuracy" in r]
        if trained:
            written.append(_draw_column(trained, folder / f"{table}-{column}.png"))
    readme = folder / "README.md"
    write_section(readme, table, markdown(table, records))
    return [*written, readme]


def _draw_column(records: list[Record], path: Path) -> Path:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for record in records:
        steps, seconds, accuracy = zip(*record["curve"], strict=True)
        label = ROWS[record["row"]]
        if record["flavour"] != "ours":
            label += f", {record['flavour']}"
        axes[0].plot(steps, accuracy, ".-", label=label)
        axes[1].plot([s / 60 for s in seconds], accuracy, ".-", label=label)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("meta-steps")
    axes[1].set_xlabel("minutes of training")
    axes[0].set_ylabel("accuracy on validation classes (%)")
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    return save(figure, path)


def markdown(table: str, records: list[Record]) -> str:
    """The table as text: ours beside the published figures, then what was not trained."""
    parts = [f"## {TABLES[table].title}\n"]
    for column in TABLES[table].columns:
        of_column = [r for r in records if r["column"] == column]
        trained = [r for r in of_column if "accuracy" in r]
        parts.append(f"### {_words(column)}\n")
        if trained:
            parts.append(f"![Learning curves]({table}-{column}.png)\n")
            parts.append(_trained_markdown(trained))
        missing = [row for row in ROWS if not any(r["row"] == row for r in trained)]
        if missing:
            parts.append(_missing_markdown(TABLES[table], column, missing, of_column))
    return "\n".join(parts)


def _words(column: str) -> str:
    way, shot = column.removesuffix("s").split("w")
    return f"{way}-way {shot}-shot"


_HEADINGS = (
    "method", "accuracy, %", "published, %", "support statistics, %", "other proximal, %",
    "validation, %", "meta-steps", "minutes", "adaptation",
)  # fmt: skip


def _trained_markdown(records: list[Record]) -> str:
    lines = [
        "| " + " | ".join(_HEADINGS) + " |",
        "| " + " | ".join("---" for _ in _HEADINGS) + " |",
    ]
    for record in records:
        proximal = "proximal_" if "proximal_accuracy" in record else "no_proximal_"
        steps = f"{record['adaptation_steps']} steps"
        if record["config"]["method"] == "imaml":
            steps += ", without" if proximal == "proximal_" else ", with"
            steps += f" lam {record['config']['lam']:g}"
        cells = [
            ROWS[record["row"]]
            + ("" if record["flavour"] == "ours" else f" ({record['flavour']})"),
            "**" + _interval(record, "") + "**",
            "{:g} ± {:g}".format(*record["published"]) if record["published"] else "",
            _interval(record, "support_"),
            _interval(record, proximal),
            _interval(record, "val_"),
            str(record["meta_steps"]),
            f"{record['seconds'] / 60:.0f}",
            steps,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(record: Record, prefix: str) -> str:
    if f"{prefix}accuracy" not in record:
        return ""
    return f"{record[f'{prefix}accuracy']:.2f} ± {record[f'{prefix}ci95']:.2f}"


def _missing_markdown(table: Table, column: str, rows: list[str], records: list[Record]) -> str:
    lines = ["Not trained:\n"]
    for row in rows:
        text = f"- {ROWS[row]}"
        if published := table.figure(row, column):
            text += " (published: {:g} ± {:g} %)".format(*published)
        timed = [r for r in records if r["row"] == row]
        if timed:
            each = timed[-1]["seconds"] / timed[-1]["meta_steps"]
            wanted = cell(timed[-1]["table"], column, row, timed[-1]["flavour"]).train.meta_steps
            text += (
                f": {each:.1f} s for a meta-step of {timed[-1]['config']['tasks']} tasks on "
                f"{timed[-1]['source']['device']}, so {wanted:,} would take "
                f"{each * wanted / 3600:.0f} hours"
            )
        lines.append(text)
    return "\n".join(lines) + "\n"


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name` in a Markdown file, or append it."""
    begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->\n"
    before = path.read_text() if path.is_file() else ""
    section = f"{begin}{text}{end}"
    if begin in before and end in before:
        head, rest = before.split(begin, 1)
        path.write_text(head + section + rest.split(end, 1)[1])
    else:
        path.write_text(before + ("\n" if before else "") + section)


def summary(records: list[Record]) -> Record:
    figures = {}
    for record in records:
        if "accuracy" not in record:
            each = record["seconds"] / record["meta_steps"]
            figures[f"{_of(record)}, a timing"] = {"seconds a meta-step": each}
            continue
        of_cell = {"accuracy": record["accuracy"], "ci95": record["ci95"]}
        if record["published"]:
            of_cell |= {
                "published": record["published"][0],
                "published_ci95": record["published"][1],
            }
        figures[f"{_of(record)}, {record['meta_steps']} meta-steps"] = of_cell
    return figures


def _study(table: str, question: str) -> Study:
    return Study(question, partial(measure, table), partial(draw, table), summary, select)


TABLE2 = _study("table2", "few-shot accuracy on Omniglot, all methods")
TABLE3 = _study("table3", "few-shot accuracy on Mini-ImageNet, all methods")
NATURAL = _study("natural", "table 3's protocol on other natural images, all methods")
