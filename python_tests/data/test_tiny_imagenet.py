"""Tiny-ImageNet from the user's file: pixels, splits, cache, and bad files."""

import numpy as np
import pytest
import torch
from archives import MUTATIONS, count_refused_mutations, write_tiny_imagenet
from PIL import Image

from imaml_ext.data import ImageEpisodes, load_tiny_imagenet


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A file with 2 + 1 + 2 classes of 3 images in one colour each, and that colour."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    colours = np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8)
    path = tmp_path / "root" / "tiny_imagenet_fewshot.npz"
    write_tiny_imagenet(path, colours, ["train", "train", "val", "test", "test"])
    return path, torch.from_numpy(colours)


def test_images_are_decoded_split_and_cached(archive, monkeypatch):
    path, colours = archive
    parts = load_tiny_imagenet(path.parent)
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "val": 1, "test": 2}
    images = torch.cat(list(parts.values()))
    assert images.shape == (5, 3, 3, 32, 32)
    want = colours[..., None, None].int().expand(5, 3, 3, 32, 32)
    assert (images.int() - want).abs().max() <= 6  # JPEG rounds
    monkeypatch.setattr(Image, "open", None)
    assert torch.equal(load_tiny_imagenet(path.parent)["test"], parts["test"])
    x, _ = ImageEpisodes(parts["test"], way=2, shot=1, query=2, tasks=4).sample(0).query
    assert x.shape == (4, 4, 3, 32, 32)


def test_a_missing_or_damaged_file_is_named(archive, tmp_path):
    path, _ = archive
    with pytest.raises(
        FileNotFoundError, match=r"tiny_imagenet_fewshot.npz; set root to its folder"
    ):
        load_tiny_imagenet(tmp_path / "elsewhere")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "header": arrays["header"][::-1]})
    with pytest.raises(ValueError, match="an image cannot be decoded"):
        load_tiny_imagenet(path.parent)
    split = arrays["split"][[0, 3, 1, 2, 4]]
    np.savez(path, **{**arrays, "split": split})
    with pytest.raises(ValueError, match="classes must be consecutive"):
        load_tiny_imagenet(path.parent)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"is truncated or not tiny_imagenet_fewshot.npz"):
        load_tiny_imagenet(path.parent)


def test_random_damage_is_refused_or_harmless(archive):
    path, _ = archive
    refused = count_refused_mutations(path, lambda: load_tiny_imagenet(path.parent))
    assert refused > 0.2 * MUTATIONS
