"""Checkpoints: a dict of tensors and plain values, written whole or not at all."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from imaml_ext.files import write_atomically

_FORMAT = "imaml_ext checkpoint"
_VERSION = 1
_MODEL = {"config", "steps", "learned"}
_TRAINING = {"seconds", "history", "validation", "random"}
_TRAINING |= {"optimizer_class", "optimizer", "scheduler"}


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state: a crash at any moment leaves the file as it was before.

    Args:
        path: of the file; folders that lack are made.
        state: tensors and plain values; what `Trainer.save` keeps has all that training needs.

    Raises:
        OSError: it cannot be written.
    """
    tagged = {"format": _FORMAT, "version": _VERSION, **state}
    write_atomically(path, lambda file: torch.save(tagged, file))


def save_model(path: str | Path, state: dict[str, Any]) -> None:
    """Keep of a state what evaluation needs: a third of it, or less.

    Args:
        path, state: as in `save_checkpoint`.

    Raises:
        KeyError: the state lacks "config", "steps" or "learned".
        OSError: it cannot be written.
    """
    save_checkpoint(path, {name: state[name] for name in sorted(_MODEL)})


def load_checkpoint(path: str | Path, *, training: bool = False) -> dict[str, Any]:
    """The state, on the CPU. Executes no pickled code.

    Args:
        path: of the file.
        training: whether it must hold what going on with the training needs.

    Returns:
        "config" (JSON), "steps" and "learned" ({name: tensor}); unless it is a model alone, also
        "seconds", "history", "validation", "optimizer", "scheduler" and "random".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, foreign, of another version, or a model alone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not zipfile.is_zipfile(path):  # nor let torch try its older formats
        raise ValueError(f"{path} is truncated or not a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} is truncated or not a checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of imaml_ext")
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a version {state.get('version')} checkpoint, expected {_VERSION}"
        )
    if training and state.keys() >= _MODEL and not _TRAINING & state.keys():
        raise ValueError(f"{path} is a model alone: it can be evaluated, not trained further")
    missing = (_MODEL | _TRAINING if training else _MODEL) - state.keys()
    if missing:
        raise ValueError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    return state
