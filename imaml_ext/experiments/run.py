"""A run: trained to its end, saved and logged on the way, stopped and gone on with."""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imaml_ext._io import locked, remove_unfinished
from imaml_ext.experiments.build import Experiment
from imaml_ext.experiments.config import Config
from imaml_ext.training.distributed import is_launched, rank
from imaml_ext.training.logs import Record, json_lines, tensorboard
from imaml_ext.training.trainer import NonfiniteError, Trainer

_LOG = "metrics.jsonl"
_SHOWN_EVERY = 1.0  # seconds; to look waits for the device


class Interrupted(KeyboardInterrupt):
    """A signal came; `signal` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train_to_end(
    experiment: Experiment,
    trainer: Trainer,
    checkpoint: Path,
    *,
    validations: int = 20,
    validation_tasks: int = 100,
    save_every: float = 60.0,
    with_tensorboard: bool = False,
    name: str = "",
    resume: str = "the same command",
) -> None:
    """Train to the end, saving with each validation, now and then between, and when it ends.

    Beside the checkpoint are metrics.jsonl, a line for each meta-step and validation, and, if asked
    for, TensorBoard's files. Of many processes rank 0 writes all of it, and validates.

    Args:
        validations, validation_tasks: how often to validate, evenly over the run, and on what.
        save_every: seconds of training from one checkpoint to the next.
        name: before the progress bar.
        resume: how to go on, for the message when interrupted.

    Raises:
        Interrupted: after the meta-step in which SIGINT or SIGTERM came; it is saved.
        NonfiniteError: a meta-step was refused; the ones before it are saved.
        OSError: the folder cannot be written to, or another process trains there.
    """
    config = experiment.config
    saved = dataclasses.asdict(config)
    leads = rank(trainer.process_group) == 0
    with ExitStack() as stack:
        if leads:
            stack.enter_context(locked(checkpoint.parent))
            remove_unfinished(checkpoint)
            remove_unfinished(checkpoint.parent / _LOG)
            stack.enter_context(_logged(trainer, checkpoint.parent, with_tensorboard))
        progress = stack.enter_context(
            tqdm(
                total=None if config.minutes else config.meta_steps, initial=trainer.steps,
                desc=name or config.dataset, unit="step", mininterval=_SHOWN_EVERY,
                dynamic_ncols=True, disable=not leads,
            )
        )  # fmt: skip
        stop = stack.enter_context(_StopSignals())
        last_saved, shown = trainer.seconds, -math.inf
        try:
            while (done := trainer.budget.progress) < 1 and not (stop.came and leads):
                trainer.step()
                if not leads:
                    continue
                if time.monotonic() >= shown + _SHOWN_EVERY:
                    progress.set_postfix(_postfix(trainer), refresh=False)
                    shown = time.monotonic()
                progress.update()
                if int(validations * trainer.budget.progress) > int(validations * done):
                    source = experiment.sources["val"]
                    trainer.validate(source, experiment.metrics, tasks=validation_tasks)
                elif trainer.seconds < last_saved + save_every:
                    continue
                trainer.save(checkpoint, saved)
                last_saved = trainer.seconds
        except ConnectionError:
            if stop.came and not leads:  # rank 0 has finished its step, and left
                raise Interrupted("with rank 0", stop.came) from None
            raise
        except NonfiniteError:
            trainer.save(checkpoint, saved)
            raise
        trainer.save(checkpoint, saved)
        if stop.came and leads:
            raise Interrupted(f"at meta-step {trainer.steps}; to go on: {resume}", stop.came)


class _StopSignals:
    """Within it the first SIGINT or SIGTERM is remembered, `came`; a second acts as ever."""

    def __init__(self) -> None:
        self.came = 0

    def __enter__(self) -> "_StopSignals":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.came = number
        if not is_launched():  # torchrun repeats what came to its process too, and kills in the end
            for each, handler in self._before.items():
                signal.signal(each, handler)


@contextmanager
def _logged(trainer: Trainer, folder: Path, with_tensorboard: bool) -> Iterator[None]:
    """The trainer's records go to the folder too."""
    own = trainer.log
    with ExitStack() as stack:
        logs = [] if own is None else [own]
        lines = json_lines(folder / _LOG, trainer.history, trainer.validation)
        logs.append(stack.enter_context(lines))
        if with_tensorboard:
            logs.append(stack.enter_context(tensorboard(folder, trainer.steps)))

        def log(split: str, record: Record) -> None:
            for each in logs:
                each(split, record)

        trainer.log = log
        try:
            yield
        finally:
            trainer.log = own


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """The config that a checkpoint of `train_to_end` was trained with."""
    try:
        saved = json.loads(state["config"])
        return Config(**saved)
    except (ValueError, TypeError) as error:  # not JSON, or not the fields of a config
        raise ValueError(
            f"{path} was not written by imaml-ext train: it does not say of what"
        ) from error


def _postfix(trainer: Trainer) -> dict[str, str]:
    recent = trainer.history[-20:]
    record = recent[-1]
    shown = {"loss": f"{sum(r['loss'] for r in recent) / len(recent):.3f}"}
    if "accuracy" in record:
        shown["acc"] = f"{100 * sum(r['accuracy'] for r in recent) / len(recent):.1f}%"
    if "linear_residual" in record:
        shown["cg"] = f"{record['linear_residual']:.1e}"
    if record.get("negative_curvature", 0) > 0:
        shown["negative"] = f"{100 * record['negative_curvature']:.0f}%"
    if trainer.validation and "accuracy" in record:
        shown["val"] = f"{100 * trainer.validation[-1]['accuracy']:.1f}%"
    return shown
