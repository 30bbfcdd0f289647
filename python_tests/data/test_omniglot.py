"""Omniglot from the user's archives: pixels, splits, cache, and bad archives."""

import hashlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from archives import MUTATIONS, count_refused_mutations, encoded, write_omniglot
from PIL import Image

from imaml_ext.data import load_omniglot
from imaml_ext.data import omniglot as module


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder in Omniglot's layout with 3 + 2 characters, and a private cache."""
    characters = {"images_background": 3, "images_evaluation": 2}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_CHARACTERS", characters)
    write_omniglot(tmp_path / "root", characters)
    return tmp_path / "root"


def rewrite(archive, change):
    """Change the {name: bytes} of an archive in place."""
    with zipfile.ZipFile(archive) as file:
        content = {name: file.read(name) for name in file.namelist()}
    change(content)
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)


def test_archives_and_folders_give_the_same_images(root):
    zipped = load_omniglot(root)
    assert zipped.images.shape == (5, 20, 28, 28)
    assert zipped.images.dtype == torch.uint8
    assert zipped.names == sorted(zipped.names)
    folder = root / "omniglot-py"
    for archive in folder.glob("*.zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        archive.unlink()
    assert torch.equal(load_omniglot(root).images, zipped.images)


def test_images_are_decoded_once(root, monkeypatch):
    first = load_omniglot(root)
    monkeypatch.setattr(module, "_decode", None)
    assert torch.equal(load_omniglot(root).images, first.images)


def test_a_damaged_cache_is_rebuilt(root, tmp_path):
    first = load_omniglot(root)
    (cache,) = (tmp_path / "cache").rglob("*.npy")
    for content in (b"", cache.read_bytes()[:-1000]):
        cache.unlink()  # the old file is still mapped
        cache.write_bytes(content)
        assert torch.equal(load_omniglot(root).images, first.images)


def test_other_pixels_under_the_same_names_are_not_taken_from_the_cache(root):
    first = load_omniglot(root)
    archive = root / "omniglot-py" / "images_background.zip"

    def swap(content):
        one, two = sorted(content)[:2]
        content[one], content[two] = content[two], content[one]

    rewrite(archive, swap)
    assert not torch.equal(load_omniglot(root).images, first.images)


def test_a_cache_that_cannot_be_written_causes_a_warning(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not cached and will be decoded again"):
        assert load_omniglot(root).images.shape == (5, 20, 28, 28)


def test_ink_has_high_values(root):
    # 10% of each drawing is ink, drawn black on white in the archive
    assert 0.05 < load_omniglot(root).images.double().mean() / 255 < 0.15


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"images_background.zip; set root .* download=True$"
    ):
        load_omniglot(tmp_path)


def test_the_error_of_a_missing_archive_crosses_processes(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_omniglot(tmp_path)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.expected) == (str(caught.value), caught.value.expected)


def test_a_truncated_archive_is_named(root):
    archive = root / "omniglot-py" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"images_evaluation.zip is truncated or not a zip"):
        load_omniglot(root)


def test_an_unrelated_archive_is_refused_and_nothing_is_cached(root, tmp_path):
    archive = root / "omniglot-py" / "images_background.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "not Omniglot")
    with pytest.raises(ValueError, match="is not Omniglot: 0 characters, expected 3"):
        load_omniglot(root)
    assert not list((tmp_path / "cache").rglob("*"))


def test_an_image_that_cannot_be_decoded_is_named(root):
    archive = root / "omniglot-py" / "images_background.zip"
    rewrite(archive, lambda content: content.update({min(content): b"not an image"}))
    with pytest.raises(ValueError, match=r"character00/0000.png cannot be decoded"):
        load_omniglot(root)


def test_a_missing_drawing_is_refused(root):
    folder = root / "omniglot-py"
    with zipfile.ZipFile(folder / "images_background.zip") as file:
        file.extractall(folder)
    next((folder / "images_background").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="has 19 drawings, expected 20"):
        load_omniglot(root)


def test_the_real_archives_decode_to_the_published_pixels(omniglot_root):
    """Against an independent decoding, whose sha256 is published with the data."""
    data = load_omniglot(omniglot_root)
    names = omniglot_root / "omniglot28.npz"
    if not names.is_file():
        pytest.skip("there is no omniglot28.npz in the root")
    with np.load(names) as arrays:
        order = [
            data.names.index(f"{alphabet}/{character}")
            for alphabet, character in zip(arrays["alphabet"], arrays["character"], strict=True)
        ]
    digest = hashlib.sha256(data.images[order].numpy().tobytes()).hexdigest()
    assert digest == "255fbb66efe334ae4ffdf873a5d430b6232d966a38612f804baa3297751298c5"


def test_the_split_is_disjoint_and_does_not_depend_on_the_machine(omniglot_root):
    data = load_omniglot(omniglot_root)
    parts = data.split()
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1100,
        "val": 100,
        "test": 423,
    }
    key = torch.cat([part.flatten(1)[:, ::7].long() for part in parts.values()])
    assert key.unique(dim=0).shape[0] == 1623
    assert torch.equal(data.split(seed=0)["test"], parts["test"])
    assert not torch.equal(data.split(seed=1)["test"], parts["test"])


def test_random_damage_is_refused_or_harmless(root):
    archive = root / "omniglot-py" / "images_background.zip"
    refused = count_refused_mutations(archive, lambda: load_omniglot(root))
    assert 0.2 * MUTATIONS < refused < MUTATIONS  # some mutations are in parts that are not read


def test_no_name_in_an_archive_writes_outside_the_cache(root, tmp_path):
    archive = root / "omniglot-py" / "images_background.zip"
    expected = load_omniglot(root).images
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    drawing = encoded(Image.new("1", (105, 105)), "png")
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:/evil.png"):
            file.writestr(name, drawing)
    assert torch.equal(load_omniglot(root).images, expected)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("images_background/../../../evil/character01/0000.png", drawing)
    with pytest.raises(ValueError, match="is not Omniglot: 4 characters, expected 3"):
        load_omniglot(root)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files


def test_an_image_that_would_fill_the_memory_is_refused(root):
    header = b"\x89PNG\r\n\x1a\n"
    body = b"IHDR" + (2**31 - 1).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    bomb = header + (13).to_bytes(4, "big") + body + zipfile.crc32(body).to_bytes(4, "big")
    archive = root / "omniglot-py" / "images_background.zip"
    rewrite(archive, lambda content: content.update({min(content): bomb}))
    with pytest.raises(ValueError, match=r"0000\.png cannot be decoded"):
        load_omniglot(root)
