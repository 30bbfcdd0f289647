"""Groups of similar classes, and tasks drawn from them."""

import pytest
import torch

from imaml_ext.data import ImageEpisodes, SimilarClasses

SIZES = {"way": 3, "shot": 1, "query": 2}


def striped_images(classes=12, side=16):
    """Class c has c lit pixels in its first row, so that classes with close numbers are similar."""
    images = torch.zeros(classes, 4, 1, side, side, dtype=torch.uint8)
    for c in range(classes):
        images[c, :, :, 0, : c + 1] = 255
    return images


def lit(x):
    """How many pixels are lit."""
    return (x > 0.5).sum((-3, -2, -1))


def on_a_circle(x):
    """Features at an angle proportional to the number of lit pixels: cosines order by distance."""
    angle = 0.25 * lit(x).to(torch.float32)
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_a_group_is_a_class_and_its_nearest():
    similar = SimilarClasses.nearest(striped_images(), on_a_circle, neighbours=2)
    assert similar.groups.shape == (12, 3)
    assert similar.groups[:, 0].tolist() == list(range(12))
    assert similar.groups[5].sort().values.tolist() == [4, 5, 6]
    assert similar.groups[0].sort().values.tolist() == [0, 1, 2]


def test_what_all_classes_have_in_common_does_not_matter():
    similar, shifted = (
        SimilarClasses.nearest(striped_images(), features, neighbours=4)
        for features in (on_a_circle, lambda x: on_a_circle(x) + torch.tensor([50.0, -20.0]))
    )
    assert torch.equal(shifted.groups.sort(1).values, similar.groups.sort(1).values)


def quadrant(x):
    """The brightness of the four corners."""
    return torch.stack([x[..., 0, 0], x[..., 0, -1], x[..., -1, -1], x[..., -1, 0]], -1)[:, 0]


def test_a_neighbour_appears_once_in_its_most_similar_rotation():
    images = torch.zeros(4, 4, 1, 8, 8, dtype=torch.uint8)
    for c, brightness in enumerate((255, 250, 245, 240)):
        images[c, :, :, 0, 0] = brightness
        images[c, :, :, 0, -1] = 20 * c  # breaks the symmetry
    images = torch.stack([torch.rot90(image, c, (-2, -1)) for c, image in enumerate(images)])
    similar = SimilarClasses.nearest(images, quadrant, neighbours=3, rotate=True)
    assert similar.groups.shape == (16, 4)
    classes, quarters = similar.decode(similar.groups)
    assert (classes.sort(1).values == torch.arange(4)).all()
    # Class c was turned by c quarters, so equal orientations have equal sums.
    assert ((classes + quarters) % 4 == (classes + quarters)[:, :1] % 4).all()


def hard_source(hard, tasks=40, images=None, **settings):
    images = striped_images() if images is None else images
    similar = SimilarClasses.nearest(images, on_a_circle, neighbours=3)
    return ImageEpisodes(images, tasks=tasks, **SIZES, **settings).with_similar(similar, hard)


def test_all_classes_of_a_hard_task_are_from_one_group():
    source = hard_source(1.0)
    groups = {frozenset(group.tolist()) for group in source.similar.groups}
    for step in range(3):
        batch = source.sample(step)
        for task in lit(batch.support[0]) - 1:
            classes = set(task.tolist())
            assert len(classes) == 3
            assert any(classes <= group for group in groups)
        query = lit(batch.query[0]).view(40, 3, 2)
        assert torch.equal(query, lit(batch.support[0])[..., None].expand(-1, -1, 2))


def test_every_member_of_a_group_gets_every_label():
    source = hard_source(1.0, tasks=4000)
    share = torch.bincount(source.similar.groups.flatten(), minlength=12) / 48
    spread = 4000 * share * (1 - share)  # binomial
    for classes in lit(source.sample(0).support[0]).unbind(1):
        counts = torch.bincount(classes, minlength=13)[1:].double()
        assert ((counts - 4000 * share).abs() < 5 * spread.sqrt()).all()


@pytest.mark.parametrize("rotate", [False, True])
def test_the_other_tasks_are_those_of_the_plain_source(rotate):
    plain = ImageEpisodes(striped_images(), tasks=400, rotate=rotate, **SIZES).sample(5)
    never = hard_source(0.0, tasks=400, rotate=rotate).sample(5)
    assert torch.equal(never.support[0], plain.support[0])
    assert torch.equal(never.query[0], plain.query[0])
    half = hard_source(0.25, tasks=400, rotate=rotate).sample(5)
    changed = (half.support[0] != plain.support[0]).flatten(1).any(1).double().mean()
    assert 0.15 < changed < 0.35


def test_hard_tasks_are_functions_of_the_step_and_the_task(device):
    images = striped_images().to(device)
    source = hard_source(0.5, images=images)
    whole = source.sample(7)
    shard = source.shard(range(10, 20)).sample(torch.tensor(7, device=device))
    assert torch.equal(shard.support[0], whole.support[0][10:20])
    assert torch.equal(shard.query[0], whole.query[0][10:20])


def test_groups_that_do_not_fit_are_refused():
    images = striped_images()
    similar = SimilarClasses.nearest(images, on_a_circle, neighbours=1)
    source = ImageEpisodes(images, tasks=2, **SIZES)
    with pytest.raises(ValueError, match="way=3, but the groups have 2 classes"):
        source.with_similar(similar)
    few = ImageEpisodes(images[:5], tasks=2, **SIZES)
    fitting = SimilarClasses.nearest(images, on_a_circle, neighbours=2)
    with pytest.raises(ValueError, match="groups of 12 classes, images of 5"):
        few.with_similar(fitting)
    with pytest.raises(ValueError, match=r"hard must be in \[0, 1\]"):
        source.with_similar(fitting, 1.5)
    turned = SimilarClasses.nearest(images, on_a_circle, neighbours=2, rotate=True)
    with pytest.raises(ValueError, match="pass rotate=True"):
        source.with_similar(turned)
    with pytest.raises(ValueError, match="neighbours=12, but there are 12 classes"):
        SimilarClasses.nearest(images, on_a_circle, neighbours=12)
