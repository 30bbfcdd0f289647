"""Task sources: what they deal, that it repeats, and what they refuse."""

import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from imaml_ext._random import random_bits, uniform
from imaml_ext.data import ImageEpisodes, Sinusoid, load_omniglot, load_tiny_imagenet
from imaml_ext.data import omniglot as module
from imaml_ext.data.tasks import RecordableSource

CPU = torch.device("cpu")


def test_random_bits_are_splitmix64():
    # The generator's published test vector: seed 1234567, first outputs of SplitMix64.
    state = 1234567
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    from imaml_ext._random import _GOLDEN, _MASK, _mix

    assert [_mix((state + (k + 1) * _GOLDEN) & _MASK) for k in range(5)] == published
    bits = random_bits(3, 5, 7, range(2), (4,), CPU)
    key = 0
    for word in (3, 5, 7):
        key = _mix(key + word * _GOLDEN + _GOLDEN)
    want = [_mix((key + k * _GOLDEN) & _MASK) >> 1 for k in range(8)]
    assert bits.flatten().tolist() == want


def test_a_task_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(
        random_bits(1, 2, 3, range(8), (5,), CPU)[:3], random_bits(1, 2, 3, range(3), (5,), CPU)
    )


def test_seed_step_and_stream_all_matter():
    draws = [
        random_bits(*key, range(1), (4,), CPU).tolist()
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len({str(draw) for draw in draws}) == 4


@pytest.mark.parametrize("seed", [0, 7, 2**40, -3])
@pytest.mark.parametrize("step", [0, 1, 41, 12345678901])
@pytest.mark.parametrize("stream", [0, 2, 9])
def test_a_step_on_the_device_draws_the_same_bits(seed, step, stream, device):
    expected = random_bits(seed, step, stream, range(3), (2,), CPU)
    number = torch.tensor(step, device=device)
    assert torch.equal(random_bits(seed, number, stream, range(3), (2,), device).cpu(), expected)


def test_a_step_on_the_device_deals_the_same_tasks(device):
    images = torch.randint(256, (9, 5, 6, 6), dtype=torch.uint8, device=device)
    episodes = ImageEpisodes(images, way=3, shot=1, query=2, tasks=4, seed=5, rotate=True)
    for source in (episodes, Sinusoid(tasks=4, seed=5, device=device)):
        assert isinstance(source, RecordableSource)
        expected, got = (source.sample(n) for n in (11, torch.tensor(11, device=device)))
        other = source.sample(torch.tensor(12, device=device))
        for part in ("support", "query"):
            for a, b in zip(getattr(expected, part), getattr(got, part), strict=True):
                assert torch.equal(a, b)
            assert not torch.equal(getattr(expected, part)[0], getattr(other, part)[0])


def test_uniform_is_uniform():
    draws = uniform(0, 0, 0, range(100_000), (), CPU)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Kolmogorov-Smirnov, 0.1% level: 1.95 / sqrt(n)
    distance = (draws.sort().values - torch.linspace(0, 1, 100_000)).abs().max()
    assert distance < 1.95 / 100_000**0.5


def labelled_images(classes=30, per_class=6, side=8):
    """Image k of class c has c in its corner and k beside it."""
    images = torch.zeros(classes, per_class, side, side, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(1, classes + 1, dtype=torch.uint8)[:, None]
    images[:, :, 0, 1] = torch.arange(1, per_class + 1, dtype=torch.uint8)
    return images


def test_episodes_deal_distinct_classes_and_disjoint_images(device):
    source = ImageEpisodes(
        labelled_images().to(device), way=5, shot=2, query=3, tasks=50, dtype=torch.float64
    )
    batch = source.sample(0)
    (xs, ys), (xq, yq) = batch.support, batch.query
    assert xs.shape == (50, 10, 1, 8, 8)
    assert xq.shape == (50, 15, 1, 8, 8)
    assert ys[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert xs.max() <= 1
    for task in range(50):
        classes = {}
        seen = set()
        for x, y in ((xs[task], ys[task]), (xq[task], yq[task])):
            for image, label in zip(x, y.tolist(), strict=True):
                corner = round(float(image[0, 0, 0] * 255))
                assert classes.setdefault(label, corner) == corner  # one label, one class
                seen.add((corner, round(float(image[0, 0, 1] * 255))))
        assert len(set(classes.values())) == 5
        assert len(seen) == 25  # no image twice, so none is in support and query


def test_rotations_turn_a_class_as_a_whole():
    source = ImageEpisodes(labelled_images(), way=5, shot=3, query=3, tasks=40, rotate=True)
    batch = source.sample(0)
    x = torch.cat([data[0].view(40, 5, 3, 1, 8, 8) for data in (batch.support, batch.query)], dim=2)
    corners = torch.stack([x[..., 0, 0, 0], x[..., 0, 0, -1], x[..., 0, -1, -1], x[..., 0, -1, 0]])
    turn = corners.argmax(0)  # where the class number went; every image has exactly one
    assert (turn == turn[..., :1]).all()
    assert turn.unique().tolist() == [0, 1, 2, 3]


def test_every_class_and_image_is_dealt_equally_often():
    source = ImageEpisodes(labelled_images(10, 4), way=3, shot=1, query=1, tasks=4000)
    x, _ = source.sample(0).support
    counts = torch.bincount((x[..., 0, 0, 0] * 255).round().long().flatten(), minlength=11)[1:]
    expected = 4000 * 3 / 10
    # binomial, 5 standard deviations
    assert ((counts - expected).abs() < 5 * (expected * 0.7) ** 0.5).all()
    images = torch.bincount((x[..., 0, 0, 1] * 255).round().long().flatten(), minlength=5)[1:]
    assert ((images - 3000).abs() < 5 * (3000 * 0.75) ** 0.5).all()
    first = (x[:, 0, 0, 0, 0] * 255).round().long()  # the class of label 0
    counts = torch.bincount(first, minlength=11)[1:]
    assert ((counts - 400).abs() < 5 * (400 * 0.9) ** 0.5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: ImageEpisodes(labelled_images(), way=5, shot=1, query=1, tasks=4, seed=seed),
        lambda seed: Sinusoid(tasks=4, seed=seed),
    ],
)
def test_a_batch_is_a_function_of_seed_and_step(make):
    first = make(3).sample(7).support[0]
    assert torch.equal(make(3).sample(7).support[0], first)
    assert not torch.equal(make(3).sample(8).support[0], first)
    assert not torch.equal(make(4).sample(7).support[0], first)


def test_sinusoid_points_lie_on_one_sinusoid():
    batch = Sinusoid(shot=10, query=20, tasks=6, dtype=torch.float64).sample(0)
    x = torch.cat([batch.support[0], batch.query[0]], 1)[..., 0]
    y = torch.cat([batch.support[1], batch.query[1]], 1)[..., 0]
    # y = a sin(x) cos(b) - a cos(x) sin(b): linear in two unknowns
    basis = torch.stack([x.sin(), -x.cos()], -1)
    solution = torch.linalg.lstsq(basis, y[..., None]).solution
    torch.testing.assert_close((basis @ solution)[..., 0], y)
    amplitude = solution[:, :, 0].norm(dim=1)
    assert ((amplitude >= 0.1) & (amplitude <= 5)).all()
    assert x.abs().max() <= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": 31}, "way=31, but there are 30 classes"),
        ({"shot": 4, "query": 3}, "need 7 images of a class, but there are 6"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"images": torch.zeros(2, 3)}, r"images must be uint8 \[classes, images, H, W\]"),
    ],
)
def test_episodes_that_cannot_be_dealt_are_refused(change, message):
    arguments = {"images": labelled_images(), "way": 5, "shot": 1, "query": 1, "tasks": 2} | change
    with pytest.raises(ValueError, match=message):
        ImageEpisodes(arguments.pop("images"), **arguments)


# ---- natural images ----------------------------------------------------------------------------


@pytest.fixture
def few_natural_images(tmp_path, monkeypatch):
    """A file in the format of the natural images: 2 + 1 + 2 classes of 3 one-coloured JPEGs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    colours = np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8)

    def jpeg(colour):
        buffer = io.BytesIO()
        image = Image.new("RGB", (32, 32), tuple(colour.tolist()))
        image.save(buffer, "jpeg", quality=95, subsampling=0)
        return buffer.getvalue()

    files = [[jpeg(colour) for colour in of_class] for of_class in colours]
    header = files[0][0].partition(b"\xff\xda")[0]  # all that comes before the scan
    assert all(file.startswith(header) for of_class in files for file in of_class)
    bodies = [[file[len(header) : -2] for file in of_class] for of_class in files]
    lengths = np.array([[len(body) for body in of_class] for of_class in bodies])
    ends = lengths.cumsum().reshape(lengths.shape)
    path = tmp_path / "tiny_imagenet_fewshot.npz"
    np.savez(
        path,
        scan=np.frombuffer(b"".join(b for of_class in bodies for b in of_class), np.uint8),
        offset=np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1),
        header=np.frombuffer(header, np.uint8),
        split=np.array(["train", "train", "val", "test", "test"]),
    )
    return path, torch.from_numpy(colours)


def test_natural_images_are_decoded_split_and_kept(few_natural_images, monkeypatch):
    path, colours = few_natural_images
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


def test_natural_images_that_are_not_there_or_damaged_are_named(few_natural_images, tmp_path):
    path, _ = few_natural_images
    with pytest.raises(FileNotFoundError, match=r"tiny_imagenet_fewshot.npz; give its folder"):
        load_tiny_imagenet(tmp_path / "elsewhere")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "header": arrays["header"][::-1]})
    with pytest.raises(ValueError, match="an image cannot be decoded"):
        load_tiny_imagenet(tmp_path)
    split = arrays["split"][[0, 3, 1, 2, 4]]
    np.savez(path, **{**arrays, "split": split})
    with pytest.raises(ValueError, match="classes must follow one another"):
        load_tiny_imagenet(tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"is truncated or not tiny_imagenet_fewshot.npz"):
        load_tiny_imagenet(tmp_path)


# ---- Omniglot --------------------------------------------------------------------------------


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """A folder in Omniglot's layout with 3 + 2 characters, and a private cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_CHARACTERS", {"images_background": 3, "images_evaluation": 2})
    root = tmp_path / "root"
    generator = np.random.default_rng(0)
    for part, characters in module._CHARACTERS.items():
        archive = root / "omniglot-py" / f"{part}.zip"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive, "w") as file:
            for character in range(characters):
                for drawing in range(20):
                    image = Image.fromarray(generator.random((105, 105)) < 0.9)
                    buffer = io.BytesIO()
                    image.save(buffer, "png")
                    name = f"{part}/Alphabet_{part}/character{character:02}/{drawing:04}.png"
                    file.writestr(name, buffer.getvalue())
    return root


def test_omniglot_from_archives_and_from_folders_is_the_same(small_omniglot):
    zipped = load_omniglot(small_omniglot)
    assert zipped.images.shape == (5, 20, 28, 28)
    assert zipped.images.dtype == torch.uint8
    assert zipped.names == sorted(zipped.names)
    folder = small_omniglot / "omniglot-py"
    for archive in folder.glob("*.zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        archive.unlink()
    assert torch.equal(load_omniglot(small_omniglot).images, zipped.images)


def test_omniglot_is_decoded_once(small_omniglot, monkeypatch):
    first = load_omniglot(small_omniglot)
    monkeypatch.setattr(module._Drawing, "decode", None)
    assert torch.equal(load_omniglot(small_omniglot).images, first.images)


def test_a_damaged_cache_is_made_anew(small_omniglot, tmp_path):
    first = load_omniglot(small_omniglot)
    (cache,) = (tmp_path / "cache").rglob("*.npy")
    for content in (b"", cache.read_bytes()[:-1000]):
        cache.unlink()  # not the file that is still mapped
        cache.write_bytes(content)
        assert torch.equal(load_omniglot(small_omniglot).images, first.images)


def test_other_pixels_under_the_same_names_are_not_taken_from_the_cache(small_omniglot):
    first = load_omniglot(small_omniglot)
    archive = small_omniglot / "omniglot-py" / "images_background.zip"
    with zipfile.ZipFile(archive) as file:
        content = {name: file.read(name) for name in file.namelist()}
    one, two = sorted(content)[:2]
    content[one], content[two] = content[two], content[one]
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    assert not torch.equal(load_omniglot(small_omniglot).images, first.images)


def test_without_a_cache_folder_it_works_and_says_so(small_omniglot, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="will be decoded again"):
        assert load_omniglot(small_omniglot).images.shape == (5, 20, 28, 28)


def test_ink_is_high(small_omniglot):
    # 10% of each drawing is ink, drawn black on white in the archive
    assert 0.05 < load_omniglot(small_omniglot).images.double().mean() / 255 < 0.15


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"images_background.zip; give its root with --data"
    ):
        load_omniglot(tmp_path)


def test_a_truncated_archive_is_named(small_omniglot):
    archive = small_omniglot / "omniglot-py" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"images_evaluation.zip is truncated or not a zip"):
        load_omniglot(small_omniglot)


def test_a_foreign_archive_is_refused_and_nothing_is_cached(small_omniglot, tmp_path):
    archive = small_omniglot / "omniglot-py" / "images_background.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "not Omniglot")
    with pytest.raises(ValueError, match="is not Omniglot: 0 characters, expected 3"):
        load_omniglot(small_omniglot)
    assert not list((tmp_path / "cache").rglob("*"))


def test_an_image_that_does_not_decode_is_named(small_omniglot):
    archive = small_omniglot / "omniglot-py" / "images_background.zip"
    with zipfile.ZipFile(archive) as file:
        content = {name: file.read(name) for name in file.namelist()}
    content[min(content)] = b"not a picture"
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    with pytest.raises(ValueError, match=r"character00/0000.png cannot be decoded"):
        load_omniglot(small_omniglot)


def test_a_missing_drawing_is_noticed(small_omniglot):
    folder = small_omniglot / "omniglot-py"
    with zipfile.ZipFile(folder / "images_background.zip") as file:
        file.extractall(folder)
    next((folder / "images_background").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="has 19 drawings, expected 20"):
        load_omniglot(small_omniglot)


def test_the_real_archives_decode_to_the_published_pixels(omniglot_root):
    """Against an independent decoding, whose sha256 is published with the data."""
    data = load_omniglot(omniglot_root)
    names = omniglot_root / "omniglot28.npz"
    if not names.is_file():
        pytest.skip("omniglot28.npz is not beside the archives")
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
