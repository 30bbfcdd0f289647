"""Checkpoints: the state of a training as a dict of tensors and plain values, in one file."""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext._io import write_atomically

_FORMAT = "imaml_ext checkpoint"
_VERSION = 1
_MODEL = {"config", "steps", "learned"}
_TRAINING = {
    *("seconds", "history", "validation"),
    *("optimizer_class", "optimizer", "scheduler", "random"),
}


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state atomically: after a crash at any moment the file is the old or the new one.

    Args:
        path: the file to write; missing folders are created.
        state: tensors and plain values; `Trainer.save` adds "config" to `Trainer.state_dict()`.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()  # on a full disk torch.save itself raises errors other than OSError
    torch.save({"format": _FORMAT, "version": _VERSION, **state}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def save_model(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write the part of a state that evaluation needs, about a third of it.

    If the state has averages of learned tensors, they replace the tensors.

    Args:
        path, state: as in `save_checkpoint`.

    Raises:
        KeyError: the state lacks "config", "steps" or "learned".
        OSError: the file cannot be written.
    """
    model = {name: state[name] for name in sorted(_MODEL)} | {"learned": evaluated_tensors(state)}
    if "seconds" in state:
        model["seconds"] = state["seconds"]
    save_checkpoint(path, model)


def evaluated_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The learned tensors, {name: tensor}, or their averages if the state has any; and buffers.

    Args:
        state: as `load_checkpoint` returns it.
    """
    return {**state["learned"], **state.get("averages", {}), **state.get("buffers", {})}


def load_checkpoint(path: str | Path, *, training: bool = False) -> dict[str, Any]:
    """Read a checkpoint, with its tensors on the CPU. No pickled code is executed.

    Args:
        path: the file to read.
        training: whether the checkpoint must contain what is needed to resume the training.

    Returns:
        A dict with "config" (JSON), "steps", "learned" (tensors by name), and "seconds", which
        models of version 0.1 lack; unless `save_model` wrote it, also the other entries of
        `Trainer.state_dict()`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, damaged, not a checkpoint, of another version, or a model
            without the state of its training.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # also keeps torch from trying its older formats
            damaged = archive.testzip()  # torch does not verify the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects other than tensors and plain values; it is not loaded"
        ) from error
    except Exception as error:  # a damaged file can make torch and zipfile raise any exception
        raise ValueError(f"{path} is truncated or not a checkpoint") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} does not match")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of imaml_ext")
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a version {state.get('version')} checkpoint, expected {_VERSION}"
        )
    missing = (_MODEL | _TRAINING if training else _MODEL) - state.keys()
    if missing in (_TRAINING, _TRAINING - {"seconds"}):
        raise ValueError(f"{path} contains only a model: it can be evaluated, not trained further")
    if missing:
        raise ValueError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    return state


@contextmanager
def loading_from(path: str | Path) -> Iterator[None]:
    """Turn any error into a ValueError of one line that starts with the path."""
    try:
        yield
    except Exception as error:  # torch's own checks are incomplete, and raise various exceptions
        message = str(error).partition("\n")[0]
        if not isinstance(error, ValueError):
            message = f"{type(error).__name__} while loading the state: {message}"
        raise ValueError(f"{path}: {message}") from error
