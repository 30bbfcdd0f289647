"""What the studies share: records as JSON lines, each with where it is from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imaml_ext.provenance import describe_run

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line may say about a study."""

    device: torch.device
    data: Path
    seed: int = 0
    meta_steps: int | None = None


@dataclass(frozen=True)
class Study:
    """A figure or table of the paper.

    Attributes:
        question: what it answers.
        measure: yields records.
        draw: a picture from the records of one run.
        summary: figures to print, from the same.
    """

    question: str
    measure: Callable[[Settings], Iterator[Record]]
    draw: Callable[[list[Record], Path], Path]
    summary: Callable[[list[Record]], Record]


def run(study: Study, settings: Settings, lines: Path) -> list[Record]:
    """Measure, appending each record to `lines` as it comes, with command, commit and device."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    source = describe_run(settings.device)
    records = []
    for measured in study.measure(settings):
        record = {**measured, "source": source}
        with lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
        records.append(record)
    return records


def last_run(lines: Path) -> list[Record]:
    """The records of the latest run in `lines`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing in it that can be read.
    """
    if not lines.is_file():
        raise FileNotFoundError(f"no measurements at {lines}")
    try:
        records = [json.loads(line) for line in lines.read_text().splitlines()]
        return [r for r in records if r["source"]["date"] == records[-1]["source"]["date"]]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{lines} does not hold measurements as JSON lines") from error
