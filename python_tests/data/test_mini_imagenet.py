"""Mini-ImageNet from a user's folder: the split, the layouts, the pixels, and bad folders."""

import hashlib
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imaml_ext.data import ImageEpisodes, load_mini_imagenet
from imaml_ext.data import mini_imagenet as module

COUNTS = {"train": 64, "val": 16, "test": 20}
CLASSES = [(part, wnid) for part, wnids in module._CLASSES.items() for wnid in wnids]
FIRST = {part: wnids[0] for part, wnids in module._CLASSES.items()}


def colour(position, image):
    """An RGB colour for each class, by its position in the list, and image."""
    return (20 + 2 * position, 60 * image, 250 - position)


def save(path, position, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour(position, image)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """WNID/WNID_IMAGE.png: 3 images of one colour each for each of the 100 classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for position, (_, wnid) in enumerate(CLASSES):
        for image in range(3):
            save(folder / wnid / f"{wnid}_{image}.png", position, image)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def in_folders(pictures, tmp_path):
    return shutil.copytree(pictures, tmp_path / "in folders")


@pytest.fixture
def listed(pictures, tmp_path):
    root = tmp_path / "listed"
    (root / "images").mkdir(parents=True)
    for part in COUNTS:
        lines = ["filename,label"]
        for wnid in module._CLASSES[part]:
            for path in sorted((pictures / wnid).iterdir()):
                shutil.copy2(path, root / "images")
                lines.append(f"{path.name},{wnid}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


def load(root):
    return load_mini_imagenet(root, images_per_class=3)


def replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def refused(root, *messages, error=ValueError):
    with pytest.raises(error) as caught:
        load(root)
    text = str(caught.value)
    assert "\n" not in text
    for message in messages:
        assert message in text


def expected():
    pixels = torch.tensor([[colour(p, k) for k in range(3)] for p in range(100)])
    images = pixels.to(torch.uint8)[..., None, None].expand(100, 3, 3, 84, 84)
    return {"train": images[:64], "val": images[64:80], "test": images[80:]}


# ---- The split -------------------------------------------------------------------------------


def test_the_split_is_the_published_one():
    classes = module._CLASSES
    assert {part: len(wnids) for part, wnids in classes.items()} == COUNTS
    assert len({wnid for wnids in classes.values() for wnid in wnids}) == 100
    digests = {
        part: hashlib.sha256("\n".join(wnids).encode()).hexdigest()
        for part, wnids in classes.items()
    }
    assert digests == {
        "train": "0f107a65ea80bf1e1d1e5e18d368f0d007e3e4c1885f33cc071363997e3814e9",
        "val": "489f8af43b2560094c8766f36213842de429622b67b5e9fed1277ebb99806f7d",
        "test": "0db5287e659efd3391c100c88f40df0f66510dfa9be94b8d0ecc66498f4e9810",
    }


# ---- Layouts and pixels ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["in_folders", "listed"])
def test_both_layouts_give_each_class_its_images_in_order(layout, request):
    data = load(request.getfixturevalue(layout))
    assert list(data) == ["train", "val", "test"]
    for part, images in expected().items():
        assert data[part].dtype == torch.uint8
        assert torch.equal(data[part], images)


def test_the_splits_are_slices_of_one_file(in_folders, cache):
    data = load(in_folders)
    assert len({images.untyped_storage().data_ptr() for images in data.values()}) == 1
    (file,) = cache.rglob("*.npy")
    assert re.fullmatch(r"mini-imagenet-84-[0-9a-f]{16}\.npy", file.name)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_pixels_are_those_of_pillow_on_rgb(in_folders, mode):
    noise = np.random.default_rng(0).integers(0, 256, (50, 120, 3), dtype=np.uint8)
    path = in_folders / FIRST["val"] / "a.jpg"
    Image.fromarray(noise).convert(mode).save(path, "jpeg" if mode == "CMYK" else "png")
    with Image.open(path) as image:
        assert image.mode == mode
        want = np.asarray(image.convert("RGB").resize((84, 84), Image.Resampling.LANCZOS))
    got = load(in_folders)["val"][0, 0].numpy()
    for channel in range(3):
        np.testing.assert_array_equal(got[channel], want[:, :, channel])


def test_a_folder_named_mini_imagenet_is_found_below_the_root(in_folders, tmp_path):
    in_folders.rename(tmp_path / "mini-imagenet")
    assert torch.equal(load(tmp_path)["test"], expected()["test"])


def test_folders_of_other_classes_are_ignored(in_folders):
    (in_folders / "n00000001").mkdir()
    (in_folders / "n00000001" / "broken.jpg").write_bytes(b"")
    (in_folders / "n99999999").mkdir()
    assert torch.equal(load(in_folders)["train"], expected()["train"])


def test_in_folders_the_first_images_by_name_are_taken(in_folders):
    folder = in_folders / FIRST["train"]
    save(folder / "a.png", 0, 4)
    (folder / "._a.png").write_bytes(b"a resource fork of macOS")
    (folder / "a.txt").write_text("not an image")
    (folder / "a.png").rename(folder / "a.JPEG")
    got = load(in_folders)["train"][0, :, :, 0, 0]
    assert got.tolist() == [list(colour(0, k)) for k in (4, 0, 1)]


def test_the_order_of_a_list_is_kept(listed):
    file = listed / "val.csv"
    header, *lines = file.read_text().splitlines()
    file.write_text("\r\n".join([header, *reversed(lines), "", ""]))
    data = load(listed)
    assert torch.equal(data["val"], expected()["val"].flip(1))
    assert torch.equal(data["test"], expected()["test"])


def test_lists_take_precedence_over_folders(listed, in_folders):
    for folder in in_folders.iterdir():
        (listed / folder.name).mkdir()
    assert torch.equal(load(listed)["val"], expected()["val"])


def test_episodes_are_sampled_from_it(in_folders):
    data = load(in_folders)
    batch = ImageEpisodes(data["test"], way=5, shot=1, query=2, tasks=4).sample(0)
    assert batch.support[0].shape == (4, 5, 3, 84, 84)
    assert batch.query[0].shape == (4, 10, 3, 84, 84)
    red = (batch.query[0][:, :, 0] * 255).round().unique()
    assert set(red.tolist()) <= {20 + 2 * position for position in range(80, 100)}


# ---- Decoding --------------------------------------------------------------------------------


def test_images_are_decoded_once(in_folders, monkeypatch):
    first = load(in_folders)
    monkeypatch.setattr(module, "_decode", None)
    assert torch.equal(load(in_folders)["train"], first["train"])


def test_a_changed_image_is_decoded_again(in_folders):
    path = in_folders / FIRST["test"] / f"{FIRST['test']}_0.png"
    before = path.stat()
    load(in_folders)
    save(path, 0, 4)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load(in_folders)["test"][0, 0, :, 0, 0].tolist() == list(colour(0, 4))


def test_a_different_order_has_a_different_cache_file(listed, cache):
    load(listed)
    wnid = FIRST["train"]
    replace(
        listed / "train.csv",
        f"{wnid}_0.png,{wnid}\n{wnid}_1.png,{wnid}",
        f"{wnid}_1.png,{wnid}\n{wnid}_0.png,{wnid}",
    )
    assert load(listed)["train"][0, 0, :, 0, 0].tolist() == list(colour(0, 1))
    assert len(list(cache.rglob("*.npy"))) == 2


def test_no_more_than_one_class_is_decoded_ahead(in_folders, monkeypatch):
    opened = []
    image = module._image
    monkeypatch.setattr(module, "_image", lambda path: opened.append(path) or image(path))
    chosen = [sorted((in_folders / wnid).iterdir()) for _, wnid in CLASSES]
    images = module._decode(chosen)
    for taken in range(1, 8):
        next(images)
        assert len(opened) <= 3 * -(-taken // 3)
    images.close()


# ---- Bad folders -----------------------------------------------------------------------------


def test_the_error_for_an_empty_folder_has_the_layouts(tmp_path):
    messages = ["WNID/*.JPEG", "train.csv, val.csv and test.csv", "; set root to "]
    refused(tmp_path, str(tmp_path), *messages, error=FileNotFoundError)
    refused(tmp_path / "nowhere", "no Mini-ImageNet", error=FileNotFoundError)


def test_lists_without_images_are_not_enough(listed):
    shutil.rmtree(listed / "images")
    refused(listed, str(listed / "images"), error=FileNotFoundError)


def test_missing_classes_are_counted(in_folders):
    for part in ("val", "test"):
        shutil.rmtree(in_folders / FIRST[part])
    refused(in_folders, f"2 of the 100 classes are missing, the first is {FIRST['val']} (val)")


@pytest.mark.parametrize("layout", ["in_folders", "listed"])
def test_a_class_with_too_few_images_is_named(layout, request):
    root = request.getfixturevalue(layout)
    wnid = FIRST["test"]
    (path,) = root.rglob(f"{wnid}_1.png")
    path.unlink()
    if layout == "listed":
        replace(root / "test.csv", f"{wnid}_1.png,{wnid}\n", "")
    refused(root, f"class {wnid} has 2 images, expected 3")


def test_600_images_are_expected_by_default(in_folders):
    with pytest.raises(ValueError, match="has 3 images, expected 600"):
        load_mini_imagenet(in_folders)


def test_zero_images_per_class_are_refused(in_folders):
    with pytest.raises(ValueError, match="images_per_class must be at least 1, got 0"):
        load_mini_imagenet(in_folders, images_per_class=0)


@pytest.mark.parametrize("damage", ["not an image", "truncated", "too large for Pillow"])
def test_an_image_that_cannot_be_decoded_is_named_and_nothing_is_cached(
    in_folders, cache, monkeypatch, damage
):
    path = in_folders / FIRST["val"] / f"{FIRST['val']}_1.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if damage == "not an image":
        path.write_bytes(b"not an image")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16)
    refused(in_folders, f"{path} cannot be decoded", "replace")
    assert [file.name for file in cache.rglob("*") if file.is_file()] == [".lock"]


def test_a_broken_link_is_named(in_folders):
    path = in_folders / FIRST["val"] / f"{FIRST['val']}_1.png"
    path.unlink()
    path.symlink_to("nowhere.png")
    refused(in_folders, f"{path} cannot be read")


def test_a_test_class_in_the_training_list_is_refused(listed):
    wnid = FIRST["test"]
    replace(listed / "test.csv", f"{wnid}_0.png,{wnid}\n", "")
    with (listed / "train.csv").open("a") as file:
        file.write(f"{wnid}_0.png,{wnid}\n")
    refused(listed, f"{listed / 'train.csv'}, line 194: {wnid!r} is not a train class")


@pytest.mark.parametrize("outside", ["../x.png", "images/../../x.png", "/x.png"])
def test_a_list_cannot_name_files_outside_the_folder(listed, outside):
    wnid = FIRST["val"]
    save(listed / "x.png", 0, 0)
    if outside == "/x.png":
        outside = str(listed / "x.png")
    replace(listed / "val.csv", f"{wnid}_0.png,", f"{outside},")
    refused(listed, f"{listed / 'val.csv'}, line 2: {outside!r} is not a file in")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filename,label\n", "", "is not a list with columns filename,label ('filename')"),
        ("filename,label\n", "filename,class\n", "with columns filename,label ('label')"),
        ("_2.png,n01855672\n", "_2.png\n", "line 4: None is not a val class"),
        ("_2.png,n01855672\n", '_2.png,"n01855672\n', "filename,label (unexpected end of data)"),
        ("_2.png,n01855672\n", "_2.png,n00000001\n", "line 4: 'n00000001' is not a val class"),
        ("_2.png,n01855672\n", "_7.png,n01855672\n", "line 4: 'n01855672_7.png' is not a file in"),
        ("n01855672_2.png,", ",", "line 4: '' is not a file in"),
        ("_2.png,n01855672\n", "_1.png,n01855672\n", "'n01855672_1.png' is not a file in"),
    ],
)
def test_a_malformed_list_is_named(listed, old, new, message):
    file = listed / "val.csv"
    replace(file, old, new)
    refused(listed, str(file), message)


def test_a_list_that_is_not_text_is_named(listed):
    (listed / "val.csv").write_bytes(b"\xff\xfe\0")
    refused(listed, f"{listed / 'val.csv'} is not a list with columns filename,label")


def test_a_class_missing_from_a_list_is_named(listed):
    wnid = FIRST["val"]
    file = listed / "val.csv"
    file.write_text("".join(s for s in file.read_text().splitlines(True) if wnid not in s))
    refused(listed, f"1 of the 100 classes are missing, the first is {wnid} (val)")


def test_a_missing_list_is_named(listed):
    (listed / "val.csv").unlink()
    refused(listed, f"{listed / 'val.csv'} is not a list", "No such file")
