"""A training run: from its config to its last checkpoint, through interruptions."""

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from imaml_ext._io import locked, remove_unfinished
from imaml_ext.experiments.build import Experiment
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.flags import flag
from imaml_ext.training.checkpoint import load_checkpoint
from imaml_ext.training.distributed import is_launched, rank
from imaml_ext.training.logs import Record, json_lines, summary_writer, tensorboard
from imaml_ext.training.trainer import NonfiniteError, Trainer

_LOG = "metrics.jsonl"
_MAY_CHANGE = ("meta_steps", "minutes", "nonfinite")  # when a run is resumed
_SHOWN_EVERY = 1.0  # seconds; reading the figures waits for the device
_RENAMED = {  # values that version 0.1 wrote into checkpoints, by field of Config
    "nonfinite": {"refuse": "propagate", "skip": "omit"},
    "linear": {"cg-reference-code": "cg-authors-code"},
}


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; `signal` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """The config in the state of a checkpoint, of this version or of 0.1.

    Raises:
        ValueError: the checkpoint was not written by `train_to_end`.
    """
    try:
        saved = json.loads(state["config"])
        for name, values in _RENAMED.items():
            if name in saved:
                saved[name] = values.get(saved[name], saved[name])
        return Config(**saved)
    except (ValueError, TypeError) as error:  # not JSON, or not the fields of a config
        raise ValueError(
            f"{path} was not written by imaml-ext train: it has no valid config"
        ) from error


def resumed_config(checkpoint: Path, settings: dict[str, Any]) -> Config:
    """The config that a checkpoint was trained with, with `settings` applied.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint` and `saved_config`, or a setting differs
            that a resumed run must keep.
    """
    saved = saved_config(load_checkpoint(checkpoint), checkpoint)
    for name, value in settings.items():
        if name not in _MAY_CHANGE and getattr(saved, name) != value:
            allowed = ", ".join(map(flag, _MAY_CHANGE))
            raise ValueError(
                f"{checkpoint} was trained with {name}={getattr(saved, name)}, got {value}: "
                f"a resumed run can change only {allowed}; use another folder for a new run"
            )
    return dataclasses.replace(saved, **settings)


def train_to_end(
    experiment: Experiment,
    trainer: Trainer,
    checkpoint: Path,
    *,
    resume: bool = False,
    validations: int = 20,
    validation_tasks: int = 100,
    save_every: float = 60.0,
    with_tensorboard: bool = False,
    name: str = "",
    plan: str = "",
    how_to_resume: str = "repeat the command",
) -> None:
    """Train until the trainer's budget is spent; save the state periodically and at the end.

    Writes metrics.jsonl, one line per meta-step and validation, next to the checkpoint, and
    TensorBoard's files on request. With a process group, rank 0 writes and validates.

    Args:
        resume: whether to load the checkpoint first.
        validations: number of validations, evenly spaced over the run; the state is saved after
            each.
        validation_tasks: tasks of each validation.
        save_every: largest time between two checkpoints, in seconds of training.
        name: label of the progress bar.
        plan: what the run will do, printed when it is certain to start.
        how_to_resume: for the message of `Interrupted`.

    Raises:
        Interrupted: after SIGINT or SIGTERM; the meta-step was completed and the state saved.
        NonfiniteError: a meta-step was refused; the state before it is saved.
        OSError: the folder is not writable, or another process trains there.
        FileNotFoundError, ValueError: as `Trainer.load`.
    """
    config, budget, leads = experiment.config, trainer.budget, rank(trainer.process_group) == 0
    saved = dataclasses.asdict(config)
    if with_tensorboard:
        summary_writer()  # raises before the folder is created
    with ExitStack() as stack:
        if leads:
            stack.enter_context(locked(checkpoint.parent))
            remove_unfinished(checkpoint)
            remove_unfinished(checkpoint.parent / _LOG)
        if resume:
            trainer.load(checkpoint)
            if leads:
                print(f"resuming from meta-step {trainer.steps}", file=sys.stderr)
        if leads:
            stack.enter_context(_logged(trainer, checkpoint.parent, with_tensorboard))
            if plan:
                print(plan, file=sys.stderr)
        bar = stack.enter_context(_progress_bar(trainer, config, name))
        received = stack.enter_context(_stop_signals())
        last_saved, shown, told = trainer.seconds, -math.inf, False
        try:
            while (before := budget.progress) < 1 and not (received and leads):
                trainer.step()
                if not leads:
                    continue
                text = "" if told or trainer.programs is None else trainer.programs.describe()
                if text:
                    bar.write(text, file=sys.stderr)
                    told = True
                if time.monotonic() >= shown + _SHOWN_EVERY:
                    bar.set_postfix_str(_postfix(trainer), refresh=False)
                    shown = time.monotonic()
                bar.update()
                if int(validations * budget.progress) > int(validations * before):
                    source = experiment.sources["val"]
                    trainer.validate(source, experiment.metrics, tasks=validation_tasks)
                elif trainer.seconds < last_saved + save_every:
                    continue
                trainer.save(checkpoint, saved)
                last_saved = trainer.seconds
        except ConnectionError:
            if received and not leads:  # rank 0 has completed its step and ended
                raise Interrupted("with rank 0", received[-1]) from None
            raise
        except NonfiniteError:
            trainer.save(checkpoint, saved)
            raise
        trainer.save(checkpoint, saved)
        if received and leads:
            message = f"at meta-step {trainer.steps}; to resume: {how_to_resume}"
            raise Interrupted(message, received[-1])


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Context in which the first SIGINT or SIGTERM is only recorded, in the list."""
    received: list[int] = []

    def record(number: int, _: object) -> None:
        received.append(number)
        if not is_launched():  # torchrun forwards a signal that this process also receives
            restore()  # so that a second one stops the process

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


@contextmanager
def _logged(trainer: Trainer, folder: Path, with_tensorboard: bool) -> Iterator[None]:
    """Context in which the trainer logs to files in the folder."""
    with ExitStack() as stack:
        lines = json_lines(folder / _LOG, trainer.history, trainer.validation)
        logs = [stack.enter_context(lines)]
        if with_tensorboard:
            logs.append(stack.enter_context(tensorboard(folder, trainer.steps)))

        def log(split: str, record: Record) -> None:
            for each in logs:
                each(split, record)

        trainer.log = log
        try:
            yield
        finally:
            trainer.log = None


def _progress_bar(trainer: Trainer, config: Config, name: str) -> Any:
    return tqdm(
        total=None if config.minutes else config.meta_steps,
        initial=trainer.steps,
        desc=name or config.dataset,
        unit="step",
        mininterval=_SHOWN_EVERY,
        dynamic_ncols=True,
        disable=rank(trainer.process_group) > 0,
    )


def _postfix(trainer: Trainer) -> str:
    recent = trainer.history[-20:]
    record = recent[-1]
    shown = {"loss": f"{fmean(r['loss'] for r in recent):.3f}"}
    if "accuracy" in record:
        shown["acc"] = f"{fmean(100 * r['accuracy'] for r in recent):.1f}%"
    if record.get("negative_curvature", 0) > 0:
        shown["negative curvature"] = f"{100 * record['negative_curvature']:.0f}%"
    if trainer.validation and "accuracy" in record:
        shown["val"] = f"{100 * trainer.validation[-1]['accuracy']:.1f}%"
    texts = [f"{name}={value}" for name, value in shown.items()]
    if minutes := trainer.budget.minutes:
        texts.insert(0, f"{trainer.seconds / 60:.1f} of {minutes:g} min")
    return ", ".join(texts)
