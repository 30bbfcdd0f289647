"""Mini-ImageNet from a user's folder: the split, the pixels, the layouts, and what is refused."""

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
    """RGB that tells apart classes (by their position in the list) and images."""
    return (20 + 2 * position, 60 * image, 250 - position)


def save(path, position, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour(position, image)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """WNID/WNID_IMAGE.png, 3 images in one colour for each of the 100 classes."""
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
def in_classes(pictures, tmp_path):
    return shutil.copytree(pictures, tmp_path / "in classes")


@pytest.fixture
def in_parts(pictures, tmp_path):
    root = tmp_path / "in parts"
    for part, wnid in CLASSES:
        shutil.copytree(pictures / wnid, root / part / wnid)
    return root


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


@pytest.mark.parametrize("layout", ["in_classes", "in_parts", "listed"])
def test_every_layout_gives_each_class_its_images_in_order(layout, request):
    data = load(request.getfixturevalue(layout))
    assert list(data) == ["train", "val", "test"]
    for part, images in expected().items():
        assert data[part].dtype == torch.uint8
        assert torch.equal(data[part], images)


def test_the_parts_are_slices_of_one_file(in_classes, cache):
    data = load(in_classes)
    assert len({images.untyped_storage().data_ptr() for images in data.values()}) == 1
    (file,) = cache.rglob("*.npy")
    assert re.fullmatch(r"mini-imagenet-84-[0-9a-f]{16}\.npy", file.name)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_pixels_are_those_of_pillow_on_rgb(in_classes, mode):
    noise = np.random.default_rng(0).integers(0, 256, (50, 120, 3), dtype=np.uint8)
    path = in_classes / FIRST["val"] / "a.jpg"
    Image.fromarray(noise).convert(mode).save(path, "jpeg" if mode == "CMYK" else "png")
    with Image.open(path) as image:
        assert image.mode == mode
        want = np.asarray(image.convert("RGB").resize((84, 84), Image.Resampling.LANCZOS))
    got = load(in_classes)["val"][0, 0].numpy()
    for channel in range(3):
        np.testing.assert_array_equal(got[channel], want[:, :, channel])


def test_a_folder_named_mini_imagenet_is_found_below_the_root(in_classes, tmp_path):
    in_classes.rename(tmp_path / "mini-imagenet")
    assert torch.equal(load(tmp_path)["test"], expected()["test"])


def test_only_the_classes_of_the_list_are_read(in_classes):
    (in_classes / "n00000001").mkdir()
    (in_classes / "n00000001" / "broken.jpg").write_bytes(b"")
    (in_classes / "n99999999").mkdir()
    assert torch.equal(load(in_classes)["train"], expected()["train"])


def test_without_a_list_the_first_images_by_name_are_taken(in_classes):
    folder = in_classes / FIRST["train"]
    save(folder / "a.png", 0, 4)
    (folder / "._a.png").write_bytes(b"what macOS leaves behind")
    (folder / "a.txt").write_text("not an image")
    (folder / "a.png").rename(folder / "a.JPEG")
    got = load(in_classes)["train"][0, :, :, 0, 0]
    assert got.tolist() == [list(colour(0, k)) for k in (4, 0, 1)]


def test_the_order_of_a_list_is_kept(listed):
    file = listed / "val.csv"
    header, *lines = file.read_text().splitlines()
    file.write_text("\r\n".join([header, *reversed(lines), "", ""]))
    data = load(listed)
    assert torch.equal(data["val"], expected()["val"].flip(1))
    assert torch.equal(data["test"], expected()["test"])


@pytest.mark.parametrize(
    ("images", "place"),
    [
        (".", "splits"),
        ("mini-imagenet", "."),
        ("mini-imagenet", "splits"),
        ("mini-imagenet", "mini-imagenet/splits"),
    ],
)
def test_lists_may_lie_beside_the_images_in_the_root_or_in_splits(listed, images, place):
    for name in (images, place):
        (listed / name).mkdir(exist_ok=True)
    (listed / "images").rename(listed / images / "images")
    for part in COUNTS:
        (listed / f"{part}.csv").rename(listed / place / f"{part}.csv")
    assert torch.equal(load(listed)["val"], expected()["val"])


def test_a_list_comes_before_folders(listed, in_classes):
    for folder in in_classes.iterdir():
        (listed / folder.name).mkdir()
    assert torch.equal(load(listed)["val"], expected()["val"])


def test_episodes_are_dealt_from_it(in_classes):
    data = load(in_classes)
    batch = ImageEpisodes(data["test"], way=5, shot=1, query=2, tasks=4).sample(0)
    assert batch.support[0].shape == (4, 5, 3, 84, 84)
    assert batch.query[0].shape == (4, 10, 3, 84, 84)
    red = (batch.query[0][:, :, 0] * 255).round().unique()
    assert set(red.tolist()) <= {20 + 2 * position for position in range(80, 100)}


# ---- Decoding --------------------------------------------------------------------------------


def test_it_is_decoded_once(in_classes, monkeypatch):
    first = load(in_classes)
    monkeypatch.setattr(module, "_decode", None)
    assert torch.equal(load(in_classes)["train"], first["train"])


def test_a_changed_image_is_decoded_again(in_classes):
    path = in_classes / FIRST["test"] / f"{FIRST['test']}_0.png"
    before = path.stat()
    load(in_classes)
    save(path, 0, 4)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load(in_classes)["test"][0, 0, :, 0, 0].tolist() == list(colour(0, 4))


def test_another_order_is_another_file(listed, cache):
    load(listed)
    wnid = FIRST["train"]
    replace(
        listed / "train.csv",
        f"{wnid}_0.png,{wnid}\n{wnid}_1.png,{wnid}",
        f"{wnid}_1.png,{wnid}\n{wnid}_0.png,{wnid}",
    )
    assert load(listed)["train"][0, 0, :, 0, 0].tolist() == list(colour(0, 1))
    assert len(list(cache.rglob("*.npy"))) == 2


def test_no_more_than_one_class_is_decoded_ahead(in_classes, monkeypatch):
    opened = []
    pixels = module._pixels
    monkeypatch.setattr(module, "_pixels", lambda path: opened.append(path) or pixels(path))
    chosen = [sorted((in_classes / wnid).iterdir()) for _, wnid in CLASSES]
    images = module._decode(chosen)
    for taken in range(1, 8):
        next(images)
        assert len(opened) <= 3 * -(-taken // 3)
    images.close()


# ---- What is refused -------------------------------------------------------------------------


def test_an_empty_folder_says_what_was_expected(tmp_path):
    messages = ["WNID/*.JPEG", "train.csv, val.csv and test.csv", "splits", "--data"]
    refused(tmp_path, str(tmp_path), *messages, error=FileNotFoundError)
    refused(tmp_path / "nowhere", "no Mini-ImageNet", error=FileNotFoundError)


def test_lists_without_images_are_not_enough(listed):
    shutil.rmtree(listed / "images")
    refused(listed, str(listed / "images"), error=FileNotFoundError)


@pytest.mark.parametrize("layout", ["in_classes", "in_parts"])
def test_missing_classes_are_counted(layout, request):
    root = request.getfixturevalue(layout)
    for part in ("val", "test"):
        (folder,) = root.rglob(FIRST[part])
        shutil.rmtree(folder)
    refused(root, f"2 of the 100 classes are missing, the first is {FIRST['val']} (val)")


def test_a_part_that_is_missing_is_twenty_missing_classes(in_parts):
    shutil.rmtree(in_parts / "test")
    refused(in_parts, f"20 of the 100 classes are missing, the first is {FIRST['test']} (test)")


@pytest.mark.parametrize("layout", ["in_classes", "in_parts", "listed"])
def test_a_class_with_too_few_images_is_named(layout, request):
    root = request.getfixturevalue(layout)
    wnid = FIRST["test"]
    (path,) = root.rglob(f"{wnid}_1.png")
    path.unlink()
    if layout == "listed":
        replace(root / "test.csv", f"{wnid}_1.png,{wnid}\n", "")
    refused(root, f"class {wnid} has 2 images, expected 3")


def test_600_images_are_expected_unless_told(in_classes):
    with pytest.raises(ValueError, match="has 3 images, expected 600"):
        load_mini_imagenet(in_classes)


def test_no_images_per_class_are_refused(in_classes):
    with pytest.raises(ValueError, match="images_per_class must be at least 1, got 0"):
        load_mini_imagenet(in_classes, images_per_class=0)


@pytest.mark.parametrize("damage", ["not a picture", "truncated", "too large for Pillow"])
def test_an_image_that_does_not_decode_is_named_and_nothing_is_cached(
    in_classes, cache, monkeypatch, damage
):
    path = in_classes / FIRST["val"] / f"{FIRST['val']}_1.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if damage == "not a picture":
        path.write_bytes(b"not a picture")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16)
    refused(in_classes, f"{path} cannot be decoded", "replace")
    assert [file.name for file in cache.rglob("*") if file.is_file()] == [".lock"]


def test_a_link_to_nothing_is_named(in_classes):
    path = in_classes / FIRST["val"] / f"{FIRST['val']}_1.png"
    path.unlink()
    path.symlink_to("nowhere.png")
    refused(in_classes, f"{path} cannot be read")


def test_a_test_class_among_the_training_folders_is_refused(in_parts):
    wnid = FIRST["test"]
    shutil.copytree(in_parts / "test" / wnid, in_parts / "train" / wnid)
    refused(in_parts, str(in_parts / "train" / wnid), f"{wnid} is a test class", "move it to")


def test_a_test_class_in_the_training_list_is_refused(listed):
    wnid = FIRST["test"]
    replace(listed / "test.csv", f"{wnid}_0.png,{wnid}\n", "")
    with (listed / "train.csv").open("a") as file:
        file.write(f"{wnid}_0.png,{wnid}\n")
    refused(listed, f"{listed / 'train.csv'}, line 194: {wnid} is a test class", "test.csv")


@pytest.mark.parametrize("outside", ["../x.png", "images/../../x.png", "/x.png"])
def test_a_list_cannot_lead_out_of_the_folder(listed, outside):
    wnid = FIRST["val"]
    save(listed / "x.png", 0, 0)
    if outside == "/x.png":
        outside = str(listed / "x.png")
    replace(listed / "val.csv", f"{wnid}_0.png,", f"{outside},")
    refused(listed, f"{listed / 'val.csv'}, line 2: {outside!r} may lie outside")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filename,label\n", "", "is malformed: its first line must be filename,label"),
        ("filename,label\n", "label,filename\n", "its first line must be filename,label"),
        ("_2.png,n01855672\n", "_2.png\n", "is malformed: line 4 must be a file name and a label"),
        ("_2.png,n01855672\n", '_2.png,"n01855672\n', "is malformed (unexpected end of data)"),
        ("_2.png,n01855672\n", "_2.png,n00000001\n", "line 4: 'n00000001' is not a class"),
        ("_2.png,n01855672\n", "_7.png,n01855672\n", "line 4: 'n01855672_7.png' is not in"),
        ("n01855672_2.png,", ",", "line 4: '' is not in"),
        ("_2.png,n01855672\n", "_1.png,n01855672\n", "line 4: 'n01855672_1.png' is listed twice"),
    ],
)
def test_a_malformed_list_is_named(listed, old, new, message):
    file = listed / "val.csv"
    replace(file, old, new)
    refused(listed, str(file), message)


def test_a_list_that_is_not_text_is_named(listed):
    (listed / "val.csv").write_bytes(b"\xff\xfe\0")
    refused(listed, f"{listed / 'val.csv'} is malformed")


def test_a_list_without_a_class_says_so(listed):
    wnid = FIRST["val"]
    file = listed / "val.csv"
    file.write_text("".join(s for s in file.read_text().splitlines(True) if wnid not in s))
    refused(listed, f"1 of the 100 classes are missing, the first is {wnid} (val)")
