"""Sinusoid regression: iMAML, MAML and first-order MAML by number of inner steps.

Each point is one training of the preset `sinusoid` with this number of inner steps, in training and
in evaluation.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from imaml_ext.experiments.build import build
from imaml_ext.experiments.plots import label, panels, save
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.reproduce.study import Record, Settings, Study

METHODS = {"imaml": "iMAML", "maml": "MAML", "fomaml": "first-order MAML"}
INNER_STEPS = (1, 2, 5, 10, 20, 40)
META_STEPS = 1500


def measure(settings: Settings) -> Iterator[Record]:
    for inner_steps in INNER_STEPS:
        for method in METHODS:
            config = dataclasses.replace(
                PRESETS["sinusoid"],
                method=method,
                inner_steps=inner_steps,
                meta_steps=settings.meta_steps or META_STEPS,
                seed=settings.seed,
            )
            experiment = build(config, device=settings.device)
            trainer = experiment.trainer()
            for _ in tqdm(range(config.meta_steps), desc=f"{method}, {inner_steps} steps"):
                trainer.step()
            trainer.read()
            result = experiment.evaluate("test", settings.eval_tasks)
            yield {
                "method": method,
                "inner_steps": inner_steps,
                "loss": result.mean["loss"],
                "ci95": result.ci95["loss"],
                "tasks": result.tasks,
                "seconds": trainer.seconds,
                "config": dataclasses.asdict(config),
            }


def draw(records: list[Record], folder: Path) -> list[Path]:
    figure, (left, right) = panels(2)
    for method, name in METHODS.items():
        points = [record for record in records if record["method"] == method]
        steps = [record["inner_steps"] for record in points]
        loss, ci95 = [r["loss"] for r in points], [r["ci95"] for r in points]
        left.errorbar(steps, loss, ci95, fmt="o-", capsize=3, label=name)
        right.plot(steps, [r["seconds"] for r in points], "o-", label=name)
    for axis, y, title in (
        (left, "mean squared error after adaptation", f"{records[0]['tasks']} unseen tasks"),
        (right, "seconds", f"training, {records[0]['config']['meta_steps']} meta-steps"),
    ):
        axis.set(xscale="log", yscale="log")
        label(axis, "inner gradient steps", y, title)
    return [save(figure, folder / "sinusoid.png")]


def summary(records: list[Record]) -> Record:
    return {
        f"{record['method']}, {record['inner_steps']} inner steps": {
            "loss": record["loss"],
            "ci95": record["ci95"],
            "seconds": round(record["seconds"], 1),
        }
        for record in records
    }


STUDY = Study("how do MAML and iMAML depend on the inner steps?", measure, draw, summary)
