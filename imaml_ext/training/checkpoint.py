"""Checkpoints: a dict of tensors and plain values, written whole or not at all."""

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext._io import write_atomically

_FORMAT = "imaml_ext checkpoint"
_VERSION = 1
_MODEL: dict[str, type] = {"config": str, "steps": int, "learned": dict}
_TRAINING: dict[str, type] = {
    "seconds": float,
    "history": list,
    "validation": list,
    "random": dict,
    "optimizer_class": str,
    "optimizer": dict,
    "scheduler": dict,
}


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state: a crash at any moment leaves the file as it was before.

    Args:
        path: of the file; folders that lack are made.
        state: tensors and plain values; what `Trainer.save` keeps has all that training needs.

    Raises:
        OSError: it cannot be written.
    """
    tagged = {"format": _FORMAT, "version": _VERSION, **state}
    whole = io.BytesIO()  # a full disk under torch.save itself raises anything
    torch.save(tagged, whole)
    write_atomically(path, lambda file: file.write(whole.getbuffer()))


def check_loadable(path: str | Path, state: Any) -> None:
    """Raises TypeError where what is to be saved at `path` holds objects that are not loaded."""
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    try:
        torch.load(saved, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search("GLOBAL (\\S+)", str(error))
        held = found[1] if found else "objects"
        raise TypeError(
            f"{path} could not be loaded again: the state holds {held}, "
            "where only tensors and plain numbers, texts, lists and dicts are"
        ) from error


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
        ValueError: it is truncated, damaged, foreign, of another version, or a model alone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # nor let torch try its older formats
            damaged = archive.testzip()  # which torch does not look at
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} is truncated or not a checkpoint") from error
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} is not what was written")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of imaml_ext")
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a version {state.get('version')} checkpoint, expected {_VERSION}"
        )
    if training and state.keys() >= _MODEL.keys() and not _TRAINING.keys() & state.keys():
        raise ValueError(f"{path} is a model alone: it can be evaluated, not trained further")
    expected = {**_MODEL, **_TRAINING} if training else _MODEL
    if missing := expected.keys() - state.keys():
        raise ValueError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    for name, kind in expected.items():
        if type(state[name]) is not kind:
            got = type(state[name]).__name__
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {got}")
    if state["steps"] < 0:
        raise ValueError(f"{path} is at meta-step {state['steps']}")
    return state


def random_states(*, cuda: bool) -> dict[str, Tensor]:
    """Of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def restore(learned: Mapping[str, Tensor], state: dict[str, Any], path: str | Path) -> None:
    """Copy a checkpoint's learned tensors into a method's.

    Args:
        learned: take the values; as `Method.learned` gives them.
        state: as `load_checkpoint` gives it.
        path: for messages.

    Raises:
        ValueError: names, shapes or dtypes differ.
    """
    if not all(isinstance(tensor, Tensor) for tensor in state["learned"].values()):
        raise ValueError(f"{path} is of another model: what it learned are not tensors")
    expected = {name: (list(tensor.shape), tensor.dtype) for name, tensor in learned.items()}
    found = {name: (list(t.shape), t.dtype) for name, t in state["learned"].items()}
    if found != expected:
        names = [n for n in {**found, **expected} if found.get(n) != expected.get(n)]
        first = names[0]
        raise ValueError(
            f"{path} is of another model: {len(names)} tensors differ, such as {first!r}: "
            f"{_says(found.get(first))}, expected {_says(expected.get(first))}"
        )
    with torch.no_grad():
        for name, tensor in learned.items():
            tensor.copy_(state["learned"][name])


def _says(tensor: tuple[list[int], torch.dtype] | None) -> str:
    return "none" if tensor is None else f"{tensor[0]} {tensor[1]}"
