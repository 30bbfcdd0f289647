"""Mini-ImageNet (Vinyals et al., 2016) with the split of Ravi & Larochelle (2017).

The images may not be passed on: they are read from the user's folder of ImageNet images.
"""

import csv
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from imaml_ext.data.cache import decoded_once

_LISTS = {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367
        n02089867 n02091831 n02101006 n02105505 n02108089 n02108551 n02108915 n02111277
        n02113712 n02120079 n02165456 n02457408 n02606052 n02687172 n02747177 n02795169
        n02823428 n02966193 n03017168 n03047690 n03062245 n03207743 n03220513 n03337140
        n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
        n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548
        n04296562 n04389033 n04435653 n04443257 n04509417 n04515003 n04596742 n04604644
        n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560 n13133613
    """,
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792
        n03075370 n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
    """,
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486
        n02443484 n02871525 n03127925 n03146219 n03272010 n03544143 n03775546 n04146614
        n04149813 n04418357 n04522168 n07613480
    """,
}
_CLASSES = {part: wnids.split() for part, wnids in _LISTS.items()}
_PART = {wnid: part for part, wnids in _CLASSES.items() for wnid in wnids}
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_SIDE = 84


def load_mini_imagenet(root: str | Path, *, images_per_class: int = 600) -> dict[str, Tensor]:
    """Images of the 64 train, 16 val and 20 test classes, uint8 [classes, images, 3, 84, 84].

    RGB, resized as MAML's `proc_images.py` does, classes in the order of the published list. The
    first time all are decoded and kept in the user's cache folder, 1.3 GB for 600 images a class.
    The three tensors are slices of that one memory-mapped file.

    Args:
        root: folder of images, or one that holds such a folder as `mini-imagenet`. It has, and the
            first that is there is read:

            - `images/NAME` with Ravi & Larochelle's `train.csv`, `val.csv` and `test.csv` (columns
              `filename,label`), in the same folder or in `splits`. Their order is kept.
            - `WNID/NAME.JPEG`, a folder for each class; those of other classes are ignored.
            - `train/WNID/NAME.jpg`, and so with `val` and `test`.

            Image files end with .jpg, .jpeg or .png, in either case.
        images_per_class: the first so many of a class are taken, as the csv file lists them, or by
            sorted name. Without csv files, of ImageNet's 1300 or so images of a class this is not
            the selection of Ravi & Larochelle.

    Raises:
        FileNotFoundError: `root` has none of these.
        ValueError: a class is missing, has too few images, or lies in another split than the
            published one; a csv file is malformed, or names a file that is not there or lies
            outside `images`; an image cannot be decoded.

    Source: Vinyals et al. 2016; the split, Ravi, Larochelle 2017.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, got {images_per_class}")
    base = Path(root)
    if (base / "mini-imagenet").is_dir():
        base /= "mini-imagenet"
    found = _find(Path(root), base)
    missing = [wnid for wnid in _PART if wnid not in found]
    if missing:
        raise ValueError(
            f"{base}: {len(missing)} of the {len(_PART)} classes are missing, the first is "
            f"{missing[0]} ({_PART[missing[0]]}); add their images from ImageNet"
        )
    for wnid in _PART:
        if len(found[wnid]) < images_per_class:
            raise ValueError(
                f"{base}: class {wnid} has {len(found[wnid])} images, expected "
                f"{images_per_class}; add images from ImageNet, or lower images_per_class"
            )
    chosen = [found[wnid][:images_per_class] for wnid in _PART]
    images = decoded_once(
        f"mini-imagenet-{_SIDE}-{_digest(base, chosen)[:16]}",
        (len(chosen), images_per_class, 3, _SIDE, _SIDE),
        lambda: _decode(chosen),
    )
    parts = images.split([len(wnids) for wnids in _CLASSES.values()])
    return dict(zip(_CLASSES, parts, strict=True))


def _find(root: Path, base: Path) -> dict[str, list[Path]]:
    """The images of each class that is there, in order."""
    for lists in (base, base / "splits", root, root / "splits"):
        if (base / "images").is_dir() and all((lists / f"{p}.csv").is_file() for p in _CLASSES):
            return _listed(lists, base / "images")
    flat = {wnid: base / wnid for wnid in _PART if (base / wnid).is_dir()}
    if flat:
        return {wnid: _images_in(folder) for wnid, folder in flat.items()}
    if any((base / part).is_dir() for part in _CLASSES):
        return _in_parts(base)
    raise FileNotFoundError(
        f"no Mini-ImageNet: expected {base / 'WNID'}/*.JPEG for {len(_PART)} classes as n01532829, "
        f"or {base / 'images'} with train.csv, val.csv and test.csv beside it or in "
        f"{base / 'splits'}, or {base / 'train' / 'WNID'}/*.jpg and so val and test; "
        "give the folder of your ImageNet images with --data"
    )


def _images_in(folder: Path) -> list[Path]:
    paths = (path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    return sorted(path for path in paths if not path.name.startswith("."))


def _in_parts(base: Path) -> dict[str, list[Path]]:
    found = {}
    for part in _CLASSES:
        for wnid, published in _PART.items():
            folder = base / part / wnid
            if not folder.is_dir():
                continue
            if published != part:
                raise ValueError(
                    f"{folder}: {wnid} is a {published} class in the published split; move it to "
                    f"{base / published}, or give {base / part} if that holds all of ImageNet"
                )
            found[wnid] = _images_in(folder)
    return found


def _listed(lists: Path, images: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    seen = set()
    for part in _CLASSES:
        file = lists / f"{part}.csv"
        for line, name, wnid in _rows(file):
            place = f"{file}, line {line}"
            published = _PART.get(wnid)
            if published is None:
                raise ValueError(
                    f"{place}: {wnid!r} is not a class of Mini-ImageNet; "
                    "use the lists of Ravi & Larochelle"
                )
            if published != part:
                raise ValueError(
                    f"{place}: {wnid} is a {published} class in the published split; "
                    f"move it to {published}.csv"
                )
            relative = Path(name)
            if relative.anchor or ".." in relative.parts:
                raise ValueError(
                    f"{place}: {name!r} may lie outside {images}; give a path inside it"
                )
            path = images / relative
            if not path.is_file():
                raise ValueError(
                    f"{place}: {name!r} is not in {images}; add the image, or remove the line"
                )
            if path in seen:
                raise ValueError(f"{place}: {name!r} is listed twice; remove the line")
            seen.add(path)
            found.setdefault(wnid, []).append(path)
    return found


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, file name and label."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{file} is malformed ({error}); use the list of Ravi & Larochelle"
        ) from error
    if not rows or rows[0][1] != ["filename", "label"]:
        raise ValueError(f"{file} is malformed: its first line must be filename,label")
    for line, row in rows[1:]:
        if len(row) != 2:
            raise ValueError(
                f"{file} is malformed: line {line} must be a file name and a label, got {row}"
            )
        yield line, row[0], row[1]


def _digest(base: Path, chosen: list[list[Path]]) -> str:
    """Changes with the names, sizes and times of the files, and with their order."""
    digest = hashlib.sha256()
    for paths in chosen:
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error}); replace it") from error
            name = path.relative_to(base).as_posix()
            digest.update(f"{name}:{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode(chosen: list[list[Path]]) -> Iterator[np.ndarray]:
    """Pixels of one image after the other; no more than one class is held in memory."""
    from tqdm import tqdm

    with (
        ThreadPoolExecutor() as pool,  # Pillow decodes and resizes without the GIL
        tqdm(
            total=sum(map(len, chosen)), desc="Mini-ImageNet", unit=" images", disable=None
        ) as progress,
    ):
        for paths in chosen:
            for pixels in pool.map(_pixels, paths):
                yield pixels
                progress.update()


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise ValueError(f"{path} cannot be decoded ({error}); replace the image") from error
    return np.asarray(small).transpose(2, 0, 1)
