"""Tiny-ImageNet for few-shot learning, 32x32, from the user's `tiny_imagenet_fewshot.npz`.

200 classes with 550 JPEGs each, split by semantic group into 128 training, 32 validation and 40
test classes, so that no test class is closely related to a training class. Accuracies are not
comparable with those published for Mini-ImageNet.

Arrays: `scan` uint8, the concatenated JPEGs without their common header and end marker; `offset`
int [200, 551]; `header` uint8; `split` "train", "val" or "test" of each class.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from imaml_ext.data.cache import decoded_once, pixels
from imaml_ext.data.missing import MissingDataError

_FILE = "tiny_imagenet_fewshot.npz"
_END = b"\xff\xd9"
_SIDE = 32


def load_tiny_imagenet(root: str | Path) -> dict[str, Tensor]:
    """Images of the train, val and test classes, uint8 [classes, images, 3, 32, 32].

    The first call decodes them in half a minute, into a file in the user's cache folder.

    Args:
        root: folder that contains `tiny_imagenet_fewshot.npz`.

    Raises:
        FileNotFoundError: `root` does not contain the file.
        ValueError: the file is damaged, or does not have the expected arrays.
    """
    path = Path(root) / _FILE
    if not path.is_file():
        raise MissingDataError(f"no Tiny-ImageNet: expected {path}", "set root to its folder")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            split, offset = arrays["split"], arrays["offset"]
            scan, header = arrays["scan"].tobytes(), arrays["header"].tobytes()
    except Exception as error:  # broken files can raise any exception
        raise ValueError(f"{path} is truncated or not {_FILE} ({error})") from error
    if offset.ndim != 2 or split.shape != offset.shape[:1]:
        raise ValueError(
            f"{path} is not {_FILE}: offset {offset.shape} must be [classes, images + 1], "
            f"split {split.shape} [classes]"
        )
    per_class = offset.shape[1] - 1

    def decode() -> Iterator[np.ndarray]:
        for row in offset.tolist():
            for start, end in pairwise(row):
                jpeg = partial(b"".join, (header, scan[start:end], _END))
                image = pixels(jpeg, f"{path}: an image", "RGB")
                if image.shape != (3, _SIDE, _SIDE):
                    raise ValueError(f"{path}: an image is {image.shape}, expected 32x32 RGB")
                yield image

    digest = hashlib.sha256(header + scan + offset.tobytes()).hexdigest()[:16]
    shape = (len(offset), per_class, 3, _SIDE, _SIDE)
    images = decoded_once(f"tiny-imagenet-{_SIDE}-{digest}", shape, decode)
    parts = {}
    for name in ("train", "val", "test"):
        (rows,) = np.nonzero(split == name)
        if len(rows) == 0 or rows[-1] - rows[0] + 1 != len(rows):
            raise ValueError(f"{path}: the {name} classes must be consecutive")
        parts[name] = images[rows[0] : rows[-1] + 1]
    return parts
