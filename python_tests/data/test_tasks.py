"""Batches of tasks: copies, overwriting in place, rows."""

import pytest
import torch

from imaml_ext import TaskBatch


def batch(tasks=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tasks, 4, 2, generator=generator, dtype=dtype) for _ in range(2))
    return TaskBatch(support=(x, {"target": y[..., 0]}), query=y)


def tensors(batch):
    return [batch.support[0], batch.support[1]["target"], batch.query]


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
