"""Small archives in the formats of the data sets, and random damage to files."""

import io
import os
import random
import zipfile

import numpy as np
from PIL import Image

MUTATIONS = int(os.environ.get("IMAML_TEST_MUTATIONS", "150"))  # of each file


def encoded(image, format, **settings):
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def write_omniglot(root, characters):
    """Archives of random drawings with 10% ink; `characters` has their number by archive."""
    generator, folder = np.random.default_rng(0), root / "omniglot-py"
    folder.mkdir(parents=True)
    for part, count in characters.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for character in range(count):
                for drawing in range(20):
                    image = Image.fromarray(generator.random((105, 105)) < 0.9)
                    name = f"{part}/Alphabet_{part}/character{character:02}/{drawing:04}.png"
                    archive.writestr(name, encoded(image, "png"))
    return folder


def write_tiny_imagenet(path, colours, split):
    """JPEGs of one colour each; `colours` is [classes, images, 3]."""
    files = [
        [
            encoded(Image.new("RGB", (32, 32), tuple(colour)), "jpeg", quality=95, subsampling=0)
            for colour in of_class
        ]
        for of_class in colours.tolist()
    ]
    header = files[0][0].partition(b"\xff\xda")[0]  # everything before the scan
    assert all(file.startswith(header) for of_class in files for file in of_class)
    bodies = [[file[len(header) : -2] for file in of_class] for of_class in files]
    lengths = np.array([[len(body) for body in of_class] for of_class in bodies])
    ends = lengths.cumsum().reshape(lengths.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        scan=np.frombuffer(b"".join(body for of_class in bodies for body in of_class), np.uint8),
        offset=np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1),
        header=np.frombuffer(header, np.uint8),
        split=np.array(split),
    )
    return path


def mutated(data, generator):
    """A copy with bits flipped, or bytes overwritten, cut or inserted; mostly near the ends."""
    data = bytearray(data)
    kind = generator.choice(["flip", "overwrite", "cut", "insert"])
    for _ in range(generator.choice([1, 1, 2, 5, 20])):
        size = len(data)
        at = generator.choice(
            [generator.randrange(size), generator.randrange(min(200, size)),
             generator.randrange(max(0, size - 2000), size)]
        )  # fmt: skip
        if kind == "flip":
            data[at] ^= 1 << generator.randrange(8)
        elif kind == "overwrite":
            data[at] = generator.randrange(256)
        elif kind == "cut":
            del data[at : at + generator.choice([1, 10, 1000])]
        else:
            data[at:at] = generator.randbytes(generator.choice([1, 4, 50]))
        data = data or bytearray(1)
    return bytes(data)


def count_refused_mutations(path, read):
    """How many mutations of the file `read` refuses, each in one line that names its folder."""
    original, generator, messages = path.read_bytes(), random.Random(0), []
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(original, generator))
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
    path.write_bytes(original)
    read()
    assert all("\n" not in text and path.parent.name in text for text in messages), messages
    return len(messages)
