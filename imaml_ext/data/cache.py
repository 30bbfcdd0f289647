"""Decoding images, once: into memory-mapped files in the user's cache folder."""

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from imaml_ext._io import locked, remove_unfinished, write_atomically

Decode = Callable[[], Iterator[np.ndarray]]  # the images in order, uint8


def pixels(read: Callable[[], bytes], name: str, mode: str, side: int | None = None) -> np.ndarray:
    """An image as uint8 [H, W] for the mode "L", [3, H, W] for "RGB".

    Args:
        read: returns a file in any format that Pillow reads.
        name: name of the image in the error.
        side: height and width to resize to; None: as they are.

    Raises:
        ValueError: the file cannot be decoded.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(read())).convert(mode)
        if side is not None:  # on a 1-bit image LANCZOS would silently be NEAREST
            image = image.resize((side, side), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow can raise any exception for a broken file
        raise ValueError(f"{name} cannot be decoded ({error}); replace it") from error
    array = np.asarray(image)
    return array if mode == "L" else array.transpose(2, 0, 1)


def decoded_once(name: str, shape: tuple[int, ...], decode: Decode) -> Tensor:
    """A memory-mapped uint8 tensor [classes, images, ...]; only the parts in use are read.

    If the cache cannot be written, the images are decoded into memory, with a warning.

    Args:
        name: name of the file, without suffix; it must change with the images.
        decode: called if the file is missing or damaged.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "imaml_ext" / f"{name}.npy"
    images = _mapped(path, shape)
    if images is None:
        try:
            with locked(path.parent, wait=True):  # another process may be decoding them
                images = _mapped(path, shape)
                if images is None:
                    remove_unfinished(path)
                    write_atomically(path, lambda file: _write(file, shape, decode()))
                    images = _mapped(path, shape)
        except OSError as error:
            warnings.warn(f"{name} is not cached and will be decoded again: {error}", stacklevel=3)
    if images is None:
        each = np.dtype((np.uint8, shape[2:]))
        images = np.fromiter(decode(), each, math.prod(shape[:2])).reshape(shape)
    return torch.from_numpy(images)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        images: np.ndarray = np.load(path, mmap_mode="c")
    except (OSError, EOFError, ValueError):  # missing or damaged
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write(file: IO[bytes], shape: tuple[int, ...], images: Iterator[np.ndarray]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for image in images:
        file.write(np.ascontiguousarray(image).data)
