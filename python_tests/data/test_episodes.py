"""Sampled tasks: what they contain, and that they are functions of seed and step."""

import pytest
import torch

from imaml_ext.data import ImageEpisodes, Sinusoid
from imaml_ext.data.tasks import RecordableSource


def labelled_images(classes=30, per_class=6, side=8):
    """Image k of class c has c + 1 in its corner and k + 1 in the pixel to the right."""
    images = torch.zeros(classes, per_class, side, side, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(1, classes + 1, dtype=torch.uint8)[:, None]
    images[:, :, 0, 1] = torch.arange(1, per_class + 1, dtype=torch.uint8)
    return images


def test_classes_of_a_task_are_distinct_and_its_images_disjoint(device):
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
                assert classes.setdefault(label, corner) == corner  # one class per label
                seen.add((corner, round(float(image[0, 0, 1] * 255))))
        assert len(set(classes.values())) == 5
        assert len(seen) == 25  # no image twice, so none in both support and query


def test_all_images_of_a_class_are_rotated_alike():
    source = ImageEpisodes(labelled_images(), way=5, shot=3, query=3, tasks=40, rotate=True)
    batch = source.sample(0)
    x = torch.cat([data[0].view(40, 5, 3, 1, 8, 8) for data in (batch.support, batch.query)], dim=2)
    corners = torch.stack([x[..., 0, 0, 0], x[..., 0, 0, -1], x[..., 0, -1, -1], x[..., 0, -1, 0]])
    turn = corners.argmax(0)  # the corner that has the class number
    assert (turn == turn[..., :1]).all()
    assert turn.unique().tolist() == [0, 1, 2, 3]


def test_every_class_and_image_is_sampled_equally_often():
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
    ("change", "message"),
    [
        ({"way": 31}, "way=31, but there are 30 classes"),
        ({"shot": 4, "query": 3}, "need 7 images per class, but there are 6"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"images": torch.zeros(2, 3)}, r"images must be uint8 \[classes, images, H, W\]"),
    ],
)
def test_impossible_tasks_are_refused(change, message):
    arguments = {"images": labelled_images(), "way": 5, "shot": 1, "query": 1, "tasks": 2} | change
    with pytest.raises(ValueError, match=message):
        ImageEpisodes(arguments.pop("images"), **arguments)


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


def test_a_step_on_the_device_gives_the_same_tasks(device):
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


def sources():
    images = torch.randint(256, (9, 5, 6, 6), dtype=torch.uint8)
    yield Sinusoid(tasks=7, seed=5)
    yield ImageEpisodes(images, way=3, shot=1, query=2, tasks=7, seed=5, rotate=True)


@pytest.mark.parametrize("source", list(sources()), ids=lambda source: type(source).__name__)
def test_a_shard_has_the_same_tasks_as_the_whole_batch(source):
    def tensors(batch):
        return [*batch.support, *batch.query]

    whole = source.sample(11)
    for tasks in (range(0, 3), range(3, 7), range(2, 3)):
        got, expected = source.shard(tasks).sample(11), whole.rows(tasks)
        assert all(map(torch.equal, tensors(got), tensors(expected)))
    shard_of_shard = source.shard(range(2, 6)).shard(range(1, 3)).sample(11)
    assert all(map(torch.equal, tensors(shard_of_shard), tensors(whole.rows(range(3, 5)))))
    assert source.tasks == 7
