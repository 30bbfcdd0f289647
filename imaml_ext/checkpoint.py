"""Checkpoints: a dict of tensors and plain values, written whole or not at all."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from imaml_ext.files import write_atomically

_FORMAT = "imaml_ext checkpoint"
_VERSION = 1
_KEYS = {"config", "steps", "seconds", "history", "validation", "learned", "random"}
_KEYS |= {"optimizer_class", "optimizer", "scheduler"}


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    tagged = {"format": _FORMAT, "version": _VERSION, **state}
    write_atomically(path, lambda file: torch.save(tagged, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state, on the CPU. Executes no pickled code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, foreign, or of another version.
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
    missing = _KEYS - state.keys()
    if missing:
        raise ValueError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    return state
