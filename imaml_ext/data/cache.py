"""A cache of decoded images: memory-mapped files in the user's cache folder."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from imaml_ext._io import locked, remove_unfinished, write_atomically

Decode = Callable[[], Iterator[np.ndarray]]  # uint8 arrays that hold all pixels in order


def decoded_once(name: str, shape: tuple[int, ...], decode: Decode) -> Tensor:
    """A memory-mapped uint8 tensor of `shape`; only the parts in use are read.

    If the cache cannot be written, the images are decoded into memory, with a warning.

    Args:
        name: of the file, without suffix; it must change with the images.
        decode: called if the file is missing or damaged.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "imaml_ext" / f"{name}.npy"
    images = _mapped(path, shape)
    if images is None:
        try:
            with locked(path.parent, wait=True):  # for a process that is decoding it
                images = _mapped(path, shape)
                if images is None:
                    remove_unfinished(path)
                    write_atomically(path, lambda file: _write(file, shape, decode()))
                    images = _mapped(path, shape)
        except OSError as error:
            warnings.warn(f"{name} is not cached and will be decoded again: {error}", stacklevel=3)
    if images is None:
        images = np.empty(shape, np.uint8)
        flat, start = images.reshape(-1), 0
        for block in decode():
            flat[start : start + block.size] = block.reshape(-1)
            start += block.size
    return torch.from_numpy(images)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        images: np.ndarray = np.load(path, mmap_mode="c")
    except (OSError, EOFError, ValueError):  # missing or damaged
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write(file: IO[bytes], shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(np.ascontiguousarray(block).data)
