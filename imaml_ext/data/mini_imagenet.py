"""Mini-ImageNet (Vinyals et al., 2016) with the split of Ravi & Larochelle (2017).

The images must not be redistributed: they are read from the user's folder of ImageNet images.
"""

import csv
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from torch import Tensor

from imaml_ext._checks import check_integer
from imaml_ext.data.cache import decoded_once, pixels
from imaml_ext.data.missing import MissingDataError

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
_CLASSES = {split: wnids.split() for split, wnids in _LISTS.items()}
_SPLIT = {wnid: split for split, wnids in _CLASSES.items() for wnid in wnids}
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_SIDE = 84


def load_mini_imagenet(root: str | Path, *, images_per_class: int = 600) -> dict[str, Tensor]:
    """Images of the 64 train, 16 val and 20 test classes, uint8 [classes, images, 3, 84, 84].

    RGB, resized as by MAML's `proc_images.py`, classes in the order of the published list. The
    first call decodes all images into a file in the user's cache folder, 1.3 GB for 600 images per
    class; the three tensors are slices of that memory-mapped file.

    Args:
        root: a folder that contains, itself or in a subfolder `mini-imagenet`, one of

            - `images/NAME`, and the lists `train.csv`, `val.csv` and `test.csv` of Ravi &
              Larochelle (columns `filename,label`), whose order is kept;
            - `WNID/NAME.JPEG`, a folder per class, such as all of ImageNet. Files end with .jpg,
              .jpeg or .png, in upper or lower case.
        images_per_class: number of images of each class, the first in the lists, or by sorted
            name. Without the lists they are not Ravi & Larochelle's selection of ImageNet's 1300
            images per class.

    Raises:
        FileNotFoundError: `root` has neither of these layouts.
        TypeError: `images_per_class` is not an integer.
        ValueError: a class is missing or has too few images; a list is malformed or differs from
            the published split; an image is missing, or cannot be decoded.

    Source: Vinyals et al. 2016; the split, Ravi, Larochelle 2017.
    """
    check_integer("images_per_class", images_per_class, minimum=1)
    base = Path(root)
    if (base / "mini-imagenet").is_dir():
        base /= "mini-imagenet"
    found = _listed(base) if (base / "images").is_dir() else _in_folders(base)
    missing = [wnid for wnid in _SPLIT if wnid not in found]
    if len(missing) == len(_SPLIT):
        raise MissingDataError(
            f"no Mini-ImageNet: expected {base / 'images'} with train.csv, val.csv and test.csv in "
            f"{base}, or {base / 'WNID'}/*.JPEG for {len(_SPLIT)} classes such as n01532829",
            "set root to the folder of your ImageNet images",
        )
    if missing:
        raise ValueError(
            f"{base}: {len(missing)} of the {len(_SPLIT)} classes are missing, the first is "
            f"{missing[0]} ({_SPLIT[missing[0]]}); add their images from ImageNet"
        )
    for wnid in _SPLIT:
        if len(found[wnid]) < images_per_class:
            raise ValueError(
                f"{base}: class {wnid} has {len(found[wnid])} images, expected "
                f"{images_per_class}; add images from ImageNet, or lower images_per_class"
            )
    chosen = [found[wnid][:images_per_class] for wnid in _SPLIT]
    images = decoded_once(
        f"mini-imagenet-{_SIDE}-{_digest(base, chosen)[:16]}",
        (len(chosen), images_per_class, 3, _SIDE, _SIDE),
        lambda: _decode(chosen),
    )
    splits = images.split([len(wnids) for wnids in _CLASSES.values()])
    return dict(zip(_CLASSES, splits, strict=True))


def _in_folders(base: Path) -> dict[str, list[Path]]:
    """The images of each class that has a folder, sorted by name."""
    found = {}
    for wnid in _SPLIT:
        if (base / wnid).is_dir():
            paths = (path for path in (base / wnid).iterdir() if path.suffix.lower() in _SUFFIXES)
            found[wnid] = sorted(path for path in paths if not path.name.startswith("."))
    return found


def _listed(base: Path) -> dict[str, list[Path]]:
    """The images of each class, in the order of the lists."""
    images = base / "images"
    listed: set[Path] = set()
    found: dict[str, list[Path]] = {}
    for split in _CLASSES:
        file = base / f"{split}.csv"
        for line, name, wnid in _rows(file):
            if _SPLIT.get(wnid) != split:
                raise ValueError(
                    f"{file}, line {line}: {wnid!r} is not a {split} class of the published split; "
                    "use the lists of Ravi & Larochelle"
                )
            path = images / name
            outside = Path(name).is_absolute() or ".." in Path(name).parts
            if outside or not path.is_file() or path in listed:
                raise ValueError(
                    f"{file}, line {line}: {name!r} is not a file in {images}, or is listed twice; "
                    "add the image, or remove the line"
                )
            listed.add(path)
            found.setdefault(wnid, []).append(path)
    return found


def _rows(file: Path) -> list[tuple[int, str, str]]:
    """The line number, file name and label of each row."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            return [(reader.line_num, row["filename"], row["label"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise ValueError(
            f"{file} is not a list with columns filename,label ({error}); "
            "use the list of Ravi & Larochelle"
        ) from error


def _digest(base: Path, chosen: list[list[Path]]) -> str:
    """Depends on the names, sizes, modification times and order of the files."""
    digest = hashlib.sha256()
    for path in chain.from_iterable(chosen):
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); replace it") from error
        name = path.relative_to(base).as_posix()
        digest.update(f"{name}:{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode(chosen: list[list[Path]]) -> Iterator[np.ndarray]:
    """The pixels of each image; at most one class is in memory."""
    from tqdm import tqdm

    total = sum(map(len, chosen))
    with (
        ThreadPoolExecutor() as pool,  # Pillow releases the GIL
        tqdm(total=total, desc="Mini-ImageNet", unit=" images", disable=None) as progress,
    ):
        for paths in chosen:
            for image in pool.map(_image, paths):
                yield image
                progress.update()


def _image(path: Path) -> np.ndarray:
    return pixels(path.read_bytes, str(path), "RGB", _SIDE)
