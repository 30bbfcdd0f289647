"""Omniglot from the user's folder, as one uint8 tensor.

The layout is torchvision's: ROOT/omniglot-py/images_background and images_evaluation, each a folder
or a .zip of ALPHABET/CHARACTER/DRAWING.png.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imaml_ext._io import locked
from imaml_ext._random import random_bits
from imaml_ext.data.cache import decoded_once, pixels
from imaml_ext.data.missing import MissingDataError

_CHARACTERS = {"images_background": 964, "images_evaluation": 659}
_DRAWINGS = 20
_SIDE = 28


@dataclass(frozen=True)
class Omniglot:
    """All characters, in the order of their sorted names.

    Attributes:
        images: uint8 [1623, 20, 28, 28], 0 where there is no ink.
        names: "ALPHABET/CHARACTER" of each.
    """

    images: Tensor
    names: list[str]

    def split(self, seed: int = 0, *, train: int = 1100, val: int = 100) -> dict[str, Tensor]:
        """Split the classes by a seeded permutation; the remaining 423 are the test classes.

        Args:
            seed: seed of the permutation.
            train, val: numbers of classes.

        Returns:
            uint8 [classes, 20, 28, 28] for "train", "val" and "test".
        """
        scores = random_bits(seed, 0, 0, range(len(self.names)), (), torch.device("cpu"))
        order = scores.argsort()
        parts = order.split([train, val, len(self.names) - train - val])
        return {
            name: self.images[part.to(self.images.device)]
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        }

    def to(self, device: torch.device | str) -> "Omniglot":
        """A copy with the images on a device."""
        return Omniglot(self.images.to(device), self.names)


def load_omniglot(root: str | Path, *, download: bool = False) -> Omniglot:
    """Read Omniglot from `root`. The first call decodes it into the user's cache folder.

    Args:
        root: folder that contains `omniglot-py`.
        download: download missing archives through torchvision.

    Raises:
        FileNotFoundError: an archive is missing.
        ValueError: an archive is truncated, or is not Omniglot; or `download` is set and
            torchvision cannot be imported.

    Source: Lake, Salakhutdinov, Tenenbaum 2015, "Human-level concept learning".
    """
    folder = Path(root) / "omniglot-py"
    if download:
        with locked(Path(root), wait=True):  # another process may be downloading them
            if any(_find(folder, part) is None for part in _CHARACTERS):
                _download(root)
    digest = hashlib.sha256()
    characters: dict[str, list[_Drawing]] = {}
    for part, expected in _CHARACTERS.items():
        before = len(characters)
        for drawing in _drawings(folder, part):
            digest.update(f"{drawing.name}:{drawing.mark}\n".encode())
            character = str(PurePosixPath(drawing.name).parent.relative_to(part))
            characters.setdefault(character, []).append(drawing)
        found = len(characters) - before
        if found != expected:
            raise ValueError(
                f"{folder / part} is not Omniglot: {found} characters, expected {expected}"
            )
    for name, drawings in characters.items():
        if len(drawings) != _DRAWINGS:
            raise ValueError(f"{folder}: {name} has {len(drawings)} drawings, expected {_DRAWINGS}")
    names = sorted(characters)
    images = decoded_once(
        f"omniglot-{_SIDE}-{digest.hexdigest()[:16]}",
        (len(names), _DRAWINGS, _SIDE, _SIDE),
        lambda: (_decode(folder, drawing) for name in names for drawing in characters[name]),
    )
    return Omniglot(images, names)


def _find(folder: Path, part: str) -> Path | None:
    candidates = (folder / part, folder / f"{part}.zip")
    return next((path for path in candidates if path.exists()), None)


class _Drawing(NamedTuple):
    """One image file.

    Attributes:
        name: "PART/ALPHABET/CHARACTER/DRAWING.png".
        mark: changes with the content.
        read: returns its bytes.
    """

    name: str
    mark: str
    read: Callable[[], bytes]


def _decode(folder: Path, drawing: _Drawing) -> np.ndarray:
    return 255 - pixels(drawing.read, f"{folder / drawing.name}", "L", _SIDE)


def _drawings(folder: Path, part: str) -> Iterator[_Drawing]:
    """Every PNG of the part, sorted by name."""
    container = _find(folder, part)
    if container is None:
        raise MissingDataError(
            f"no Omniglot: expected {folder / part} or {folder / part}.zip",
            "set root to the folder that contains omniglot-py, or download=True",
        )
    if container.is_dir():
        for path in sorted(container.rglob("*.png")):
            status = path.stat()
            mark = f"{status.st_size} {status.st_mtime_ns}"
            yield _Drawing(path.relative_to(folder).as_posix(), mark, path.read_bytes)
        return
    try:
        archive = zipfile.ZipFile(container)  # closed with the last drawing that refers to it
    except Exception as error:  # broken files can raise any exception
        raise ValueError(f"{container} is truncated or not a zip archive ({error})") from error
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if info.filename.startswith(f"{part}/") and info.filename.endswith(".png"):
            yield _Drawing(info.filename, f"{info.CRC:08x}", partial(archive.read, info))


def _download(root: str | Path) -> None:
    try:
        from torchvision.datasets import Omniglot as Archive
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"the download needs torchvision, which cannot be imported ({error}); "
            "pip install torchvision"
        ) from error
    for background in (True, False):
        Archive(str(root), background=background, download=True)
