"""Tables 2 and 3: every method on few-shot image classification, cell by cell.

A cell is trained, or its training is resumed, then tested once on unseen classes and appended as
one line. A cell with a line is not measured again, so a table can grow over many short runs of the
same command. A training of another length is a new one.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imaml_ext.experiments.build import Experiment, build, percentages
from imaml_ext.experiments.cells import FEATURES, ROWS, TABLES, Cell, cell, kept_as
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.reproduce.study import Record, Settings, Study, read_lines
from imaml_ext.experiments.reproduce.table_report import draw
from imaml_ext.experiments.run import resumed_config, train_to_end
from imaml_ext.training.checkpoint import load_checkpoint, save_model
from imaml_ext.training.trainer import NonfiniteError, Trainer
from imaml_ext.training.weight_averaging import averaged

_VALIDATIONS = 8
_SIDE_TASKS = 200  # tasks of every evaluation except the main one
_TRAINED = 100  # meta-steps; a shorter run is a timing and is not tested


def measure(table: str, settings: Settings) -> Iterator[Record]:
    lines = settings.out / f"{table}.jsonl"
    chosen = [
        cell(table, column, row, settings.variant)
        for column in settings.cells or TABLES[table].columns
        for row in settings.methods or TABLES[table].rows(column, settings.variant)
    ]
    for one in chosen:
        config = dataclasses.replace(
            one.train,
            seed=settings.seed,
            minutes=settings.budget,
            meta_steps=settings.meta_steps or one.train.meta_steps,
        )
        record: Record = {
            "table": one.table,
            "column": one.column,
            "row": one.row,
            "variant": one.variant,
            "seed": config.seed,
            "published": one.published and list(one.published),
            "config": vars(config),
            "test": one.changes,
        }
        if any(_repeats(record, old, settings.eval_tasks) for old in read_lines(lines)):
            tqdm.write(
                f"{one.name}: already in {lines}, not trained again; delete its line to repeat it"
            )
            continue
        try:
            record |= _measure(one, config, settings)
        except NonfiniteError as error:  # the other cells may succeed
            tqdm.write(f"{one.name}: {error}")
            record["failed"] = str(error)
        yield record


def _repeats(record: Record, old: Record, tasks: int) -> bool:
    """Whether an old record has this training and, if it was tested, this number of tasks."""
    defaults = vars(Config(dataset=""))  # of the fields that the config of an old version lacks
    old = {**old, "config": defaults | old["config"]}
    return record.items() <= old.items() and old.get("test_tasks", tasks) == tasks


def _measure(one: Cell, config: Config, settings: Settings) -> Record:
    start = _features(config, settings) if config.start else None
    record: Record = {}
    if start is not None:
        record["start"] = {"meta_steps": start["steps"], "seconds": start["seconds"]}
    if start is not None and config.method == "ridge-head":  # trained for all columns at once
        experiment = build(config, data=settings.data, device=settings.device)
        experiment.initialise(start)
        record |= {"meta_steps": 0, "seconds": 0.0, "curve": []}
        return record | _test(experiment, settings.eval_tasks)
    experiment, trainer, checkpoint = _train(config, one.name, settings, start)
    record |= {"meta_steps": trainer.steps, "seconds": trainer.seconds}
    if trainer.steps < _TRAINED:
        return record
    record["curve"] = [
        [r["step"], round(r["seconds"], 2), 100 * r["accuracy"]] for r in trainer.validation
    ]
    with averaged(trainer.optimizer):
        record |= _test(experiment.adapting(**one.changes), settings.eval_tasks)
    _keep_if_best(one, checkpoint, record["val_accuracy"], settings.out)
    return record


def _train(
    config: Config, name: str, settings: Settings, start: Record | None = None
) -> tuple[Experiment, Trainer, Path]:
    """Train to the end, or resume; returns the trainer and its checkpoint, too."""
    length = f"{config.minutes:g}min" if config.minutes else f"{config.meta_steps}steps"
    checkpoint = settings.runs / f"{name}-seed{config.seed}-{length}" / "checkpoint.pt"
    resume = checkpoint.exists()
    if resume:
        resumed_config(checkpoint, vars(config))  # raises if its settings differ
    experiment = build(config, data=settings.data, device=settings.device)
    trainer = experiment.trainer(start=start)
    train_to_end(
        experiment, trainer, checkpoint, resume=resume,
        validations=_VALIDATIONS if config.meta_steps >= _TRAINED else 0,
        validation_tasks=min(100, settings.eval_tasks), name=name,
    )  # fmt: skip
    return experiment, trainer, checkpoint


def _features(config: Config, settings: Settings) -> Record:
    """The model that a training starts from; it is learned first if the folder lacks it.

    Its "seconds" include those of the model that it started from itself.
    """
    name = f"{config.start}-seed{config.seed}" if config.seed else config.start
    model = settings.out / "models" / f"{name}.pt"
    if not model.exists():
        features = dataclasses.replace(FEATURES[config.start], seed=config.seed)
        start = _features(features, settings) if features.start else None
        _, _, checkpoint = _train(features, config.start, settings, start)
        state = load_checkpoint(checkpoint)
        if start is not None:
            state["seconds"] += start["seconds"]
        save_model(model, state)
    return load_checkpoint(model)


def _test(experiment: Experiment, tasks: int) -> Record:
    print(f"evaluating on {tasks} unseen tasks", file=sys.stderr)
    config, few = experiment.config, min(_SIDE_TASKS, tasks)
    figures = {
        "test_tasks": tasks,
        "side_tasks": few,
        "adaptation_steps": config.inner_steps,
        **percentages(experiment.evaluate("test", tasks)),
        **percentages(experiment.evaluate("val", few), "val_"),
    }
    if config.method == "imaml":
        proximal = not config.eval_proximal
        other = experiment.adapting(eval_proximal=proximal)
        name = "proximal_" if proximal else "no_proximal_"
        figures |= percentages(other.evaluate("test", few), name)
    return figures


def _keep_if_best(one: Cell, checkpoint: Path, accuracy: float, out: Path) -> None:
    """Keep the best model of its name by validation accuracy; test classes must not select it."""
    name = kept_as(one.table, one.column, one.row)
    lines = read_lines(out / f"{one.table}.jsonl")
    others = [r for r in lines if kept_as(one.table, r["column"], r["row"]) == name]
    if accuracy > max((r.get("val_accuracy", 0.0) for r in others), default=0.0):
        state = load_checkpoint(checkpoint)
        state["config"] = json.dumps(json.loads(state["config"]) | one.changes)
        save_model(out / "models" / f"{name}.pt", state)


def select(records: list[Record]) -> list[Record]:
    """The latest record of each cell, seed and length, in the order of the table."""
    latest = {}
    for record in records:
        config = record["config"]
        latest[_name(record), record["seed"], config["minutes"], config["meta_steps"]] = record
    rows = list(ROWS)
    return sorted(latest.values(), key=lambda r: (rows.index(r["row"]), r["variant"]))


def summary(records: list[Record]) -> Record:
    figures: Record = {}
    for record in records:
        name = f"{_name(record)}, seed {record['seed']}"
        if "failed" in record:
            figures[f"{name}, failed"] = {"why": record["failed"]}
        elif "accuracy" not in record:
            each = record["seconds"] / record["meta_steps"]
            figures[f"{name}, a timing"] = {"seconds per meta-step": each}
        else:
            of_cell = {"accuracy": record["accuracy"], "ci95": record["ci95"]}
            if record["published"]:
                of_cell["published"], of_cell["published_ci95"] = record["published"]
            figures[f"{name}, {record['meta_steps']} meta-steps"] = of_cell
    return figures


def _name(record: Record) -> str:
    return "-".join(record[key] for key in ("table", "column", "row", "variant"))


STUDIES = {
    table: Study(question, partial(measure, table), partial(draw, table), summary, select)
    for table, question in {
        "table2": "few-shot accuracy on Omniglot, all methods",
        "table3": "few-shot accuracy on Mini-ImageNet, all methods",
        "natural": "table 3's protocol on other natural images, all methods",
    }.items()
}
