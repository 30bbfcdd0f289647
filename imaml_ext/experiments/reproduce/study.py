"""What the studies share: records as JSON lines, each with where it is from."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imaml_ext.experiments.provenance import describe_run

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line may say about a study.

    Attributes:
        meta_steps: of each training, where there are any.
        out: folder of the records, pictures and models.
        columns, rows, variant: of a table, which cells; None: all.
        minutes: of training for each cell, over all runs of it; 0: meta-steps alone.
        tasks: of each evaluation.
        runs: folder of the cells' checkpoints.
    """

    device: torch.device
    data: Path
    seed: int = 0
    meta_steps: int | None = None
    out: Path = Path("results")
    columns: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    variant: str = "ours"
    minutes: float = 0.0
    tasks: int = 600
    runs: Path = Path("runs")


def last_run(records: list[Record]) -> list[Record]:
    """The records of the latest run."""
    return [r for r in records if r["source"]["date"] == records[-1]["source"]["date"]]


@dataclass(frozen=True)
class Study:
    """A figure or table of the paper.

    Attributes:
        question: what it answers.
        measure: yields records.
        draw: writes pictures, and whatever else follows from the records, to a folder.
        summary: figures to print.
        select: of all records that were ever appended, those that `draw` and `summary` are given.
        may_be_empty: whether there is something to draw where nothing was measured.
    """

    question: str
    measure: Callable[[Settings], Iterator[Record]]
    draw: Callable[[list[Record], Path], list[Path]]
    summary: Callable[[list[Record]], Record]
    select: Callable[[list[Record]], list[Record]] = last_run
    may_be_empty: bool = False


def run(study: Study, settings: Settings, lines: Path) -> None:
    """Measure, appending each record to `lines` as it comes, with command, commit and device."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    read_lines(lines)  # says now what is wrong with it
    source = describe_run(settings.device)
    for measured in study.measure(settings):
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**measured, "source": source}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(study: Study, lines: Path) -> list[Record]:
    """The records in `lines` that count.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing in it that can be read.
    """
    if not lines.is_file() and not study.may_be_empty:
        raise FileNotFoundError(f"no measurements at {lines}")
    try:
        records = study.select(read_lines(lines))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{lines} does not hold measurements of this study") from error
    return records


def read_lines(lines: Path) -> list[Record]:
    """Every record in `lines`; none where there is no such file.

    Raises:
        ValueError: a line is not whole.
    """
    records = []
    text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{lines}, line {number} is not whole: delete it to go on ({error})"
            ) from error
    if text and not text.endswith("\n"):
        raise ValueError(f"{lines}, line {len(records)} lacks its end: delete it to go on")
    return records
