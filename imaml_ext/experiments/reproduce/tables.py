"""Tables 2 and 3: every method on few-shot image classification, cell by cell.

A cell is trained from its checkpoint on, if it has one, tested once, at the end, on unseen classes,
and appended as one line. A line that is there already is not measured again, so a table grows over
many short runs of the same command. Another budget is another run, from the start.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial

from tqdm import tqdm

from imaml_ext.experiments.build import Experiment, build
from imaml_ext.experiments.cells import ROWS, TABLES, Cell, cell
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.reproduce.study import Record, Settings, Study, read_lines
from imaml_ext.experiments.reproduce.table_report import draw
from imaml_ext.experiments.run import saved_config, train_to_end
from imaml_ext.training.checkpoint import load_checkpoint, save_model
from imaml_ext.training.evaluation import Evaluation, evaluate
from imaml_ext.training.trainer import NonfiniteError

_VALIDATIONS = 8
_SIDE_TASKS = 200  # of validation, and of what is reported beside the accuracy
_TRAINED = 100  # meta-steps; a shorter run is a timing: nothing is learned, nothing is tested


def measure(table: str, settings: Settings) -> Iterator[Record]:
    lines = settings.out / f"{table}.jsonl"
    cells = [
        cell(table, column, row, settings.variant)
        for column in settings.columns or TABLES[table].columns
        for row in settings.rows or _rows(table, settings.variant)
    ]
    for one in cells:
        config = dataclasses.replace(
            one.train,
            seed=settings.seed,
            minutes=settings.minutes,
            meta_steps=settings.meta_steps or one.train.meta_steps,
        )
        if any(_is_of(record, one, config, settings.tasks) for record in read_lines(lines)):
            tqdm.write(f"{one.name}: measured already; delete its line to measure again")
            continue
        record = _about(one, config)
        try:
            record |= _measure(one, config, settings)
        except NonfiniteError as error:  # the other cells can be trained all the same
            tqdm.write(f"{one.name}: {error}")
            record |= {"failed": str(error)}
        yield record


def _rows(table: str, variant: str) -> list[str]:
    """Rows that have this variant."""
    found = []
    for row in ROWS:
        with contextlib.suppress(ValueError):
            cell(table, TABLES[table].columns[0], row, variant)
            found.append(row)
    if not found:
        raise ValueError(f"{table} has no cell in variant {variant!r}")
    return found


def _is_of(record: Record, one: Cell, config: Config, tasks: int) -> bool:
    """Whether a record is of this cell, trained and tested so."""
    return (
        _of(record) == one.name
        and record["config"] == vars(config)
        and record["test"] == _changed(one)
        and record.get("test_tasks", tasks) == tasks
    )


def _of(record: Record) -> str:
    """The name of the cell that a record is of."""
    return "-".join(record[key] for key in ("table", "column", "row", "variant"))


def _about(one: Cell, config: Config) -> Record:
    return {
        "table": one.table,
        "column": one.column,
        "row": one.row,
        "variant": one.variant,
        "seed": config.seed,
        "published": one.published,
        "config": vars(config),
        "test": _changed(one),
    }


def _measure(one: Cell, config: Config, settings: Settings) -> Record:
    experiment = build(config, data=settings.data, device=settings.device)
    trainer = experiment.trainer()
    length = f"{config.minutes:g}min" if config.minutes else f"{config.meta_steps}steps"
    checkpoint = settings.runs / f"{one.name}-seed{config.seed}-{length}" / "checkpoint.pt"
    if checkpoint.exists():
        if saved_config(load_checkpoint(checkpoint), checkpoint) != config:
            raise ValueError(f"{checkpoint} is of other settings: move it away to train anew")
        trainer.load(checkpoint)
    short = config.meta_steps < _TRAINED
    train_to_end(
        experiment, trainer, checkpoint, validations=0 if short else _VALIDATIONS,
        validation_tasks=min(100, settings.tasks), name=one.name,
    )  # fmt: skip
    record: Record = {"meta_steps": trainer.steps, "seconds": trainer.seconds}
    if trainer.steps < _TRAINED:
        return record
    record["curve"] = [
        [r["step"], round(r["seconds"], 2), 100 * r["accuracy"]] for r in trainer.validation
    ]
    record |= _tested(experiment.adapting(**_changed(one)), one, settings.tasks)
    model = settings.out / "models" / f"{one.table}-{one.column}.pt"
    others = read_lines(settings.out / f"{one.table}.jsonl")
    best = [r["val_accuracy"] for r in others if r["column"] == one.column and "accuracy" in r]
    if record["val_accuracy"] > max(best, default=0.0):  # never by the test classes
        state = load_checkpoint(checkpoint)
        state["config"] = json.dumps(vars(config) | _changed(one))
        save_model(model, state)
    return record


def _tested(experiment: Experiment, one: Cell, tasks: int) -> Record:
    few = min(_SIDE_TASKS, tasks)
    figures = {
        "test_tasks": tasks,
        "side_tasks": few,
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


def _changed(one: Cell) -> Record:
    """What is set differently in evaluation."""
    train, test = vars(one.train), vars(one.test)
    return {name: test[name] for name in train if train[name] != test[name]}


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
    """The latest record of each cell, seed and length, in the order of the table."""
    latest = {}
    for record in records:
        config = record["config"]
        latest[_of(record), record["seed"], config["minutes"], config["meta_steps"]] = record
    rows = list(ROWS)
    return sorted(latest.values(), key=lambda r: (rows.index(r["row"]), r["variant"]))


def summary(records: list[Record]) -> Record:
    figures = {}
    for record in records:
        name = f"{_of(record)}, seed {record['seed']}"
        if "failed" in record:
            figures[f"{name}, failed"] = {"why": record["failed"]}
            continue
        if "accuracy" not in record:
            each = record["seconds"] / record["meta_steps"]
            figures[f"{name}, a timing"] = {"seconds a meta-step": each}
            continue
        of_cell = {"accuracy": record["accuracy"], "ci95": record["ci95"]}
        if record["published"]:
            of_cell |= {
                "published": record["published"][0],
                "published_ci95": record["published"][1],
            }
        figures[f"{name}, {record['meta_steps']} meta-steps"] = of_cell
    return figures


def _study(table: str, question: str) -> Study:
    return Study(
        question, partial(measure, table), partial(draw, table), summary, select, may_be_empty=True
    )


TABLE2 = _study("table2", "few-shot accuracy on Omniglot, all methods")
TABLE3 = _study("table3", "few-shot accuracy on Mini-ImageNet, all methods")
NATURAL = _study("natural", "table 3's protocol on other natural images, all methods")
