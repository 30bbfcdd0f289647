"""Random images in Omniglot's layout, for a rehearsal without Omniglot."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CHARACTERS = {"images_background": 964, "images_evaluation": 659}


def write_omniglot_like(root: Path) -> None:
    """Archives like torchvision's; all drawings of a character are the same random image."""
    folder = root / "omniglot-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, characters in CHARACTERS.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for character in range(characters):
                coarse = rng.random((7, 7)) < 0.7  # white paper
                buffer = io.BytesIO()
                Image.fromarray(np.kron(coarse, np.ones((4, 4), dtype=bool))).save(buffer, "png")
                for drawing in range(20):
                    name = f"{part}/Alphabet_{part}/character{character:03}/{drawing:02}.png"
                    archive.writestr(name, buffer.getvalue())
