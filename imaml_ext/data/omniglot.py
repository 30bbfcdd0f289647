"""Omniglot, from the user's folder, as one uint8 tensor.

Layout, as torchvision's: ROOT/omniglot-py/images_background and images_evaluation, each a folder or
a .zip of ALPHABET/CHARACTER/DRAWING.png.
"""

import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from imaml_ext.files import write_atomically
from imaml_ext.random import random_bits

_CHARACTERS = {"images_background": 964, "images_evaluation": 659}
_DRAWINGS = 20
_SIDE = 28


@dataclass(frozen=True)
class Omniglot:
    """All characters, in the order of their sorted names.

    Attributes:
        images: uint8 [1623, 20, 28, 28], ink high on 0.
        names: "ALPHABET/CHARACTER" of each.
    """

    images: Tensor
    names: list[str]

    def split(self, seed: int = 0, *, train: int = 1100, val: int = 100) -> dict[str, Tensor]:
        """Classes, by a seeded permutation: `train`, `val`, and the 423 others as `test`."""
        scores = random_bits(seed, 0, 0, len(self.names), (), torch.device("cpu"))
        order = scores.argsort()
        parts = order.split([train, val, len(self.names) - train - val])
        return {
            name: self.images[part.to(self.images.device)]
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        }

    def to(self, device: torch.device | str) -> "Omniglot":
        return Omniglot(self.images.to(device), self.names)


def load_omniglot(root: str | Path, *, download: bool = False) -> Omniglot:
    """Read Omniglot from `root`. The first time it is decoded and kept in the user's cache folder.

    Args:
        root: folder that holds `omniglot-py`.
        download: fetch it through torchvision if it is not there.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: an archive is truncated, or is not Omniglot.
    """
    folder = Path(root) / "omniglot-py"
    if download and any(_find(folder, part) is None for part in _CHARACTERS):
        _download(root)
    digest = hashlib.sha256()
    for part in _CHARACTERS:
        for name, mark, _ in _members(folder, part):
            digest.update(f"{part}/{name}:{mark}\n".encode())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "imaml_ext" / f"omniglot-{_SIDE}-{digest.hexdigest()[:16]}.npz"
    try:
        with cache.open("rb") as file, np.load(file) as arrays:
            return Omniglot(torch.from_numpy(arrays["images"]), arrays["names"].tolist())
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there yet, or damaged
    images, names = _decode(folder)
    try:
        write_atomically(cache, lambda file: np.savez(file, images=images, names=names))
    except OSError as error:
        warnings.warn(f"Omniglot will be decoded again next time: {error}", stacklevel=2)
    return Omniglot(torch.from_numpy(images), names)


def _find(folder: Path, part: str) -> Path | None:
    candidates = (folder / part, folder / f"{part}.zip")
    return next((path for path in candidates if path.exists()), None)


def _members(folder: Path, part: str) -> Iterator[tuple[str, str, "_Read"]]:
    """Name below the part, a mark of its content, and a way to read it, of every PNG, sorted."""
    place = _find(folder, part)
    if place is None:
        raise FileNotFoundError(
            f"no Omniglot: expected {folder / part} or {folder / part}.zip; "
            "give its root with --data, or let torchvision fetch it with imaml-ext train --download"
        )
    if place.is_dir():
        for path in sorted(place.rglob("*.png")):
            yield path.relative_to(place).as_posix(), _mark(path), _Read(path)
        return
    try:
        with zipfile.ZipFile(place) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                name = PurePosixPath(info.filename)
                if name.suffix == ".png" and name.parts[0] == part:
                    inside = name.relative_to(part).as_posix()
                    yield inside, f"{info.CRC:08x}", _Read(archive, info.filename)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{place} is truncated or not a zip archive ({error})") from error


def _mark(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class _Read:
    """Where an image's bytes are."""

    place: Path | zipfile.ZipFile
    name: str = ""

    def __call__(self) -> bytes:
        if isinstance(self.place, Path):
            return self.place.read_bytes()
        return self.place.read(self.name)


def _decode(folder: Path) -> tuple[np.ndarray, list[str]]:
    from PIL import Image

    characters: dict[str, list[np.ndarray]] = {}
    for part, expected in _CHARACTERS.items():
        before = len(characters)
        for name, _, read in _members(folder, part):
            try:
                # Without convert("L"), LANCZOS on the 1-bit image would silently be NEAREST.
                with Image.open(io.BytesIO(read())) as image:
                    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"{folder / part}: {name} cannot be decoded ({error})") from error
            characters.setdefault(str(PurePosixPath(name).parent), []).append(
                255 - np.asarray(small)
            )
        found = len(characters) - before
        if found != expected:
            raise ValueError(
                f"{folder / part} is not Omniglot: {found} characters, expected {expected}"
            )
    for name, drawings in characters.items():
        if len(drawings) != _DRAWINGS:
            raise ValueError(f"{name}: {len(drawings)} drawings, expected {_DRAWINGS}")
    names = sorted(characters)
    return np.stack([np.stack(characters[name]) for name in names]), names


def _download(root: str | Path) -> None:
    try:
        from torchvision.datasets import Omniglot as Archive
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"--download needs torchvision, which cannot be imported ({error}); "
            "pip install 'imaml_ext[download]'"
        ) from error
    for background in (True, False):
        Archive(str(root), background=background, download=True)
