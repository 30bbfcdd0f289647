"""What the studies share: records as JSON lines, each with its provenance."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imaml_ext.experiments.provenance import describe_run

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The options of `imaml-ext reproduce` that a study may use.

    Attributes:
        meta_steps: meta-steps of each training, if any; None: the study's default.
        eval_tasks: tasks of each evaluation.
        out: folder of the records, plots and models.
        cells, methods: columns and rows of a table; None: all.
        variant: which settings a table uses.
        budget: minutes of training for each cell, over all runs; 0: no time limit.
        runs: folder of the cells' checkpoints.
    """

    device: torch.device
    data: Path
    seed: int = 0
    meta_steps: int | None = None
    eval_tasks: int = 600
    out: Path = Path("results")
    cells: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    variant: str = "ours"
    budget: float = 0.0
    runs: Path = Path("runs")


def last_run(records: list[Record]) -> list[Record]:
    """The records of the latest run; raises IndexError without records."""
    latest = records[-1]["source"]["date"]
    return [record for record in records if record["source"]["date"] == latest]


@dataclass(frozen=True)
class Study:
    """A figure or table of the paper.

    Attributes:
        question: the question that it answers.
        measure: yields records.
        draw: writes plots and other files into a folder, from records alone; returns the paths.
        summary: figures to print, from records alone.
        select: chooses the records for `draw` and `summary` from all that were appended.
    """

    question: str
    measure: Callable[[Settings], Iterator[Record]]
    draw: Callable[[list[Record], Path], list[Path]]
    summary: Callable[[list[Record]], Record]
    select: Callable[[list[Record]], list[Record]] = last_run


def measure(study: Study, settings: Settings, lines: Path) -> None:
    """Append each record of the study to `lines` as soon as it is measured."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    read_lines(lines)  # raises before anything is measured
    source = describe_run(settings.device)
    for record in study.measure(settings):
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "source": source}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(study: Study, lines: Path) -> list[Record]:
    """The records in `lines` that the study selects.

    Raises:
        ValueError: a line is incomplete or not a record of this study, or it needs a record.
    """
    try:
        return study.select(read_lines(lines))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{lines} does not contain measurements of this study: run without --draw-only"
        ) from error


def read_lines(lines: Path) -> list[Record]:
    """Every record in `lines`; an empty list if there is no such file.

    Raises:
        ValueError: a line is incomplete.
    """
    if not lines.is_file():
        return []
    records = []
    for number, line in enumerate(lines.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            records.append(json.loads(line))
            whole = line.endswith("\n")
        except json.JSONDecodeError:
            whole = False
        if not whole:
            raise ValueError(f"{lines}, line {number} is incomplete: delete it to continue")
    return records
