"""Batches of tasks: copies, overwriting in place, rows."""

from collections import namedtuple

import pytest
import torch
from torch.utils.data import TensorDataset

from imaml_ext import TaskBatch
from imaml_ext.data.tasks import LoaderSource, as_source, batches

CPU = torch.device("cpu")


def batch(tasks=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tasks, 4, 2, generator=generator, dtype=dtype) for _ in range(2))
    return TaskBatch(support=(x, {"target": y[..., 0]}), query=y)


def tensors(batch):
    return [batch.support[0], batch.support[1]["target"], batch.query]


def test_weights_are_copied_moved_and_sliced_with_their_tasks(device):
    whole = batch(tasks=5)
    weights = torch.arange(5.0)
    whole = TaskBatch(whole.support, whole.query, weights)
    assert TaskBatch.of(whole).weights is weights
    assert torch.equal(whole.rows(range(1, 3)).weights, torch.tensor([1.0, 2.0]))
    assert torch.equal(whole.to(device).weights.cpu(), weights)
    assert whole.to(device).weights.device == weights.to(device).device
    copy = whole.clone()
    copy.weights.zero_()
    assert torch.equal(weights, torch.arange(5.0))
    copy.copy_(whole)
    assert torch.equal(copy.weights, weights)
    with pytest.raises(ValueError, match="the batch must have the shapes and dtypes"):
        copy.copy_(batch(tasks=5))  # without weights
    with pytest.raises(ValueError, match="the batch must have the shapes and dtypes"):
        batch(tasks=5).copy_(whole)


@pytest.mark.parametrize("names", [("support", "query"), ("train", "test")])
def test_a_dict_may_have_weights(names):
    weights = torch.ones(3)
    got = TaskBatch.of(dict(zip(names, ((X, Y), (QX, QY)), strict=True)) | {"weights": weights})
    assert got.weights is weights
    assert got.query == (QX, QY)


def test_the_length_is_the_number_of_tasks():
    assert len(batch(tasks=5)) == 5


def test_a_clone_shares_no_memory():
    original = batch()
    before = [t.clone() for t in tensors(original)]
    for tensor in tensors(original.clone()):
        tensor.zero_()
    assert all(map(torch.equal, tensors(original), before))


def test_rows_are_views_of_consecutive_tasks():
    whole = batch(tasks=5)
    rows = whole.rows(range(1, 3))
    for part, tensor in zip(tensors(rows), tensors(whole), strict=True):
        assert torch.equal(part, torch.stack([tensor[1], tensor[2]]))
        assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_a_batch_is_overwritten_in_place():
    target, source = batch(seed=1), batch(seed=2)
    memory = [t.data_ptr() for t in tensors(target)]
    target.copy_(source)
    assert all(map(torch.equal, tensors(target), tensors(source)))
    assert [t.data_ptr() for t in tensors(target)] == memory


@pytest.mark.parametrize(
    "other",
    [
        batch(tasks=2),
        batch(dtype=torch.float64),
        TaskBatch(support=batch().support[0], query=batch().query),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_another_shape_dtype_or_structure_is_refused_and_nothing_is_written(other):
    target = batch(seed=1)
    before = [t.clone() for t in tensors(target)]
    with pytest.raises(ValueError, match="the batch must have the shapes and dtypes"):
        target.copy_(other)
    assert all(map(torch.equal, tensors(target), before))


# ---- the forms of batches, and iterables of them

X, Y, QX, QY = (torch.randn(3, 4, 2) for _ in range(4))
Episode = namedtuple("Episode", ["support", "query"])
FORMS = {
    "a batch": TaskBatch((X, Y), (QX, QY)),
    "a pair": ((X, Y), (QX, QY)),
    "a list, as of default_collate": [[X, Y], [QX, QY]],
    "a named tuple": Episode((X, Y), (QX, QY)),
    "four tensors": (X, Y, QX, QY),
    "support and query": {"support": (X, Y), "query": (QX, QY)},
    "train and test, as in torchmeta": {"test": [QX, QY], "train": [X, Y]},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_every_form_of_a_batch_has_its_support_and_query(form):
    got = TaskBatch.of(form)
    assert all(map(torch.equal, (*got.support, *got.query), (X, Y, QX, QY)))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ((X, Y), "a tuple of Tensor, Tensor"),  # inputs and labels, or support and query?
        (([X, Y], QX), "a tuple of list, Tensor"),
        ((X, Y, QX), "a tuple of Tensor, Tensor, Tensor"),
        ([((X, Y), (QX, QY))] * 4, "a list of tuple, tuple, tuple, tuple"),  # tasks, not stacked
        ({"x": X, "y": Y}, r"a dict of \['x', 'y'\]"),
        ({"support": X}, r"a dict of \['support'\]"),
        (X, "Tensor"),
        (None, "NoneType"),
        (TaskBatch, "the class TaskBatch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_in_one_line(value, got):
    with pytest.raises(TypeError, match=rf"^a batch must be TaskBatch\(.*, got {got}$") as caught:
        TaskBatch.of(value)
    assert "\n" not in str(caught.value)


def test_a_moved_batch_is_on_the_device(device):
    got = TaskBatch((X, {"mask": Y > 0}), QX).to(device)
    moved = got.support[0], got.support[1]["mask"], got.query
    assert {tensor.device for tensor in moved} == {X.to(device).device}
    assert torch.equal(got.support[1]["mask"].cpu(), Y > 0)


def numbered(count):
    """Batches that contain their number."""
    return [(torch.full((2, 3), float(k)), X[:2], QX[:2], QY[:2]) for k in range(count)]


def number(batch):
    return int(batch.support[0][0, 0])


def test_a_list_is_a_function_of_the_step():
    source = LoaderSource(numbered(3), CPU)
    assert [number(source.sample(step)) for step in (0, 1, 2, 3, 7, 1)] == [0, 1, 2, 0, 1, 1]
    assert source.repeatable


class Loader:
    """Not a sequence; counts how often it was started."""

    def __init__(self, count):
        self.count, self.started = count, 0

    def __iter__(self):
        self.started += 1
        return iter(numbered(self.count))


def test_an_iterable_is_repeated_in_its_order_from_any_step():
    loader = Loader(3)
    source = LoaderSource(loader, CPU)
    assert loader.started == 0
    assert [number(source.sample(step)) for step in (5, 6, 7, 8, 9)] == [0, 1, 2, 0, 1]
    assert loader.started == 2
    assert not source.repeatable


def test_only_the_last_batch_of_an_iterable_can_be_sampled_again():
    source = LoaderSource(Loader(3), CPU)
    first = source.sample(0)
    assert source.sample(0) is first
    assert source.can_sample(0)
    assert number(source.sample(1)) == 1
    assert not source.can_sample(0)


def test_a_generator_ends_with_a_remedy():
    source = LoaderSource((batch for batch in numbered(2)), CPU)
    assert [number(source.sample(step)) for step in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match=r"^source \(generator\) has no more batches: pass a Data"):
        source.sample(2)
    with pytest.raises(ValueError, match="has no more batches"):
        LoaderSource(Loader(0), CPU).sample(0)


def test_one_pass_over_an_iterable_has_each_batch_once():
    assert [number(batch) for batch in batches(Loader(3), CPU)] == [0, 1, 2]
    assert [number(batch) for batch in batches(numbered(2), CPU)] == [0, 1]


class Source:
    def sample(self, step):
        return numbered(step + 1)[step]


def test_the_batches_of_a_source_do_not_end():
    endless = batches(Source(), CPU)
    assert [number(next(endless)) for _ in range(5)] == [0, 1, 2, 3, 4]
    source = Source()
    assert as_source(source, CPU) is source


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "NoneType"),
        ("data", "str"),
        (Source, "the class Source"),
        (lambda step: None, "function"),
        (batch(), "TaskBatch"),
        ({"support": X, "query": QX}, "dict"),
        (TensorDataset(X, Y), "TensorDataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_but_a_source_or_an_iterable_of_batches_is_refused(value, got):
    message = rf"^source must have a method sample\(step\), or be an iterable .*, got {got}$"
    with pytest.raises(TypeError, match=message):
        as_source(value, CPU)
    with pytest.raises(TypeError, match=message):
        next(batches(value, CPU))


def test_a_list_that_holds_no_batches_is_refused_at_once():
    with pytest.raises(ValueError, match="source has no batches"):
        as_source([], CPU)
    with pytest.raises(TypeError, match="a batch must be TaskBatch"):
        as_source([(X, Y)], CPU)
