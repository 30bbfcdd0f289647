"""Files that are not what they should be: one line that names them, and nothing changed."""

import io
import json
import os
import random
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import make_trainer, state_of

import imaml_ext.data.omniglot as omniglot
from imaml_ext.data import load_omniglot, load_tiny_imagenet
from imaml_ext.training.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
MUTATIONS = int(os.environ.get("IMAML_TEST_MUTATIONS", "150"))  # of each file


def mutated(data, generator):
    """Some bits flipped, bytes overwritten, cut out or put in; mostly near the ends."""
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


def read_mutations(path, read):
    """How many mutations of the file were refused, in one line each. The others can be read."""
    original, generator, said = path.read_bytes(), random.Random(0), []
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(original, generator))
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            said.append(str(error))
    path.write_bytes(original)
    read()
    assert all("\n" not in text and path.parent.name in text for text in said), said
    return len(said)


def png(drawing):
    buffer = io.BytesIO()
    Image.fromarray(drawing).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """Omniglot with one character in each part, and a private cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(omniglot, "_CHARACTERS", {"images_background": 1, "images_evaluation": 1})
    generator, folder = np.random.default_rng(0), tmp_path / "root" / "omniglot-py"
    folder.mkdir(parents=True)
    for part in omniglot._CHARACTERS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for drawing in range(20):
                pixels = generator.random((105, 105)) < 0.9
                archive.writestr(f"{part}/Of_{part}/character01/{drawing:04}.png", png(pixels))
    return folder


@pytest.fixture
def natural_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def jpeg(shade):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (shade, 0, 90)).save(buffer, "jpeg")
        return buffer.getvalue()

    files = [jpeg(shade) for shade in (10, 80, 200)]  # a class each
    header = files[0].partition(b"\xff\xda")[0]
    bodies = [file[len(header) : -2] for file in files]
    ends = np.cumsum([len(body) for body in bodies])
    path = tmp_path / "root" / "tiny_imagenet_fewshot.npz"
    path.parent.mkdir()
    np.savez(
        path,
        scan=np.frombuffer(b"".join(bodies), np.uint8), header=np.frombuffer(header, np.uint8),
        offset=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
        split=np.array(["train", "val", "test"]),
    )  # fmt: skip
    return path


def test_damaged_archives_of_drawings_are_refused_or_can_be_read(small_omniglot):
    refused = read_mutations(
        small_omniglot / "images_background.zip", lambda: load_omniglot(small_omniglot.parent)
    )
    assert 0.2 * MUTATIONS < refused < MUTATIONS  # some mutations change nothing that is read


def test_damaged_archives_of_photographs_are_refused_or_can_be_read(natural_images):
    read = read_mutations(natural_images, lambda: load_tiny_imagenet(natural_images.parent))
    assert read > 0.2 * MUTATIONS


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    trainer = make_trainer(CPU, capturable=False)
    trainer.step()
    trainer.save(path)
    other = make_trainer(CPU, capturable=False)
    before = state_of(other)

    def read():
        try:
            other.load(path)
        except ValueError:
            assert other.steps == 0
            assert all(map(torch.equal, state_of(other), before))
            raise
        for got, expected in zip(state_of(other), state_of(trainer), strict=True):
            assert torch.equal(got, expected)  # bits that rot do not pass for parameters
        other.__dict__.update(make_trainer(CPU, capturable=False).__dict__)

    assert read_mutations(path, read) > 0.5 * MUTATIONS


ODD = [None, -1, 0.5, "text", b"bytes", [], {}, [1], {"a": 1}, torch.zeros(2)]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_checkpoint_with_something_odd_in_it_changes_nothing(odd, tmp_path):
    path = tmp_path / "c.pt"
    trainer = make_trainer(CPU, capturable=False)
    trainer.step()
    trainer.save(path)
    state = load_checkpoint(path, training=True)
    for name in state.keys() - {"format", "version"}:
        save_checkpoint(path, {**state, name: odd})
        other = make_trainer(CPU, capturable=False)
        before = state_of(other)
        if type(odd) is type(state[name]) and name in (
            "config",
            "history",
            "seconds",
            "validation",
        ):
            continue  # which the trainer does not look into
        with pytest.raises(ValueError, match=r"c\.pt") as caught:
            other.load(path)
        assert "\n" not in str(caught.value)
        assert other.steps == 0
        assert all(map(torch.equal, state_of(other), before))


def test_names_in_an_archive_cannot_lead_out_of_it(small_omniglot, tmp_path):
    archive = small_omniglot / "images_background.zip"
    expected = load_omniglot(small_omniglot.parent).images
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    outside = png(np.zeros((105, 105), bool))
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:/evil.png"):
            file.writestr(name, outside)
    assert torch.equal(load_omniglot(small_omniglot.parent).images, expected)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("images_background/../../../evil/character01/0000.png", outside)
    with pytest.raises(ValueError, match="is not Omniglot: 2 characters, expected 1"):
        load_omniglot(small_omniglot.parent)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_picture_that_would_fill_the_memory_is_refused(small_omniglot):
    header = b"\x89PNG\r\n\x1a\n"
    body = b"IHDR" + (2**31 - 1).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    bomb = header + (13).to_bytes(4, "big") + body + zipfile.crc32(body).to_bytes(4, "big")
    archive = small_omniglot / "images_background.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for drawing in range(20):
            file.writestr(f"images_background/A/character01/{drawing:04}.png", bomb)
    with pytest.raises(ValueError, match=r"0000\.png cannot be decoded"):
        load_omniglot(small_omniglot.parent)


def test_what_a_checkpoint_says_of_itself_is_json(tmp_path):
    trainer = make_trainer(CPU, capturable=False)
    trainer.save(tmp_path / "c.pt", {"note": "kept"})
    assert json.loads(load_checkpoint(tmp_path / "c.pt")["config"]) == {"note": "kept"}
