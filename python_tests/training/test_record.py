"""Records: means over the tasks that did not fail, and access that waits."""

import numpy
import pytest
import torch
from trainings import WithNan, make_method, sinusoid

from imaml_ext import MAML, TaskBatch
from imaml_ext.solvers.solution import Status
from imaml_ext.training.record import DeferredRecord, measure


def largest(params, data):
    return data[1].amax()


@pytest.mark.parametrize("failed", [[], [2]])
def test_a_record_has_the_means_over_the_tasks_that_did_not_fail(failed, device):
    method = make_method(device, nonfinite="omit")
    batch = WithNan(device, {0}, failed).sample(0)
    out = method.meta_gradient(batch)
    gradients, record = measure(method, out, batch, {"largest": largest}, None)
    assert gradients.keys() == method.learned().keys()
    used = [task for task in range(6) if task not in failed]
    expected = {
        "loss": out.query_loss[used].mean(),
        "support_loss": out.support_loss[used].mean(),
        "largest": batch.query[1][used].amax((1, 2)).mean(),
        "inner_residual": out.inner.residual[used].mean(),
        "linear_residual": out.linear.residual[used].mean(),
        "negative_curvature": (out.linear.status[used] == Status.NEGATIVE_CURVATURE).mean(
            dtype=torch.float64
        ),
        "failed": torch.tensor(len(failed) / 6),
    }
    assert record.keys() == expected.keys()
    for name, value in record.items():
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(expected[name].item())


@pytest.mark.parametrize("failed", [[], [2, 4]])
def test_a_record_has_the_weights_of_the_batch(failed, device):
    method = make_method(device, nonfinite="omit")
    batch = WithNan(device, {0}, failed).sample(0)
    weights = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.0, 1.5], device=device)  # task 4 is padding
    batch = TaskBatch(batch.support, batch.query, weights)
    out = method.meta_gradient(batch)
    _, record = measure(method, out, batch, {"largest": largest}, None)
    used = [task for task in range(6) if task not in failed]

    def mean(values):
        return numpy.average(values[used].cpu(), weights=weights[used].cpu())

    assert record["loss"].item() == pytest.approx(mean(out.query_loss))
    assert record["largest"].item() == pytest.approx(mean(batch.query[1].amax((1, 2))))
    assert record["inner_residual"].item() == pytest.approx(mean(out.inner.residual))
    assert record["failed"].item() == pytest.approx(1 / 8 if failed else 0)


def test_a_method_without_a_linear_solve_has_no_record_of_one(device):
    method, batch = make_method(device, MAML), sinusoid(device).sample(0)
    _, record = measure(method, method.meta_gradient(batch), batch, {}, None)
    assert record.keys() == {"loss", "support_loss", "inner_residual", "failed"}


def test_a_deferred_record_is_read_once_when_it_is_accessed():
    reads = []

    def read():
        reads.append(1)
        deferred.record = {"loss": 2.0, "step": 1}

    deferred = DeferredRecord(read)
    assert reads == []
    assert deferred["loss"] == 2
    assert dict(deferred) == {"loss": 2.0, "step": 1}
    assert len(deferred) == 2
    assert repr(deferred) == "{'loss': 2.0, 'step': 1}"
    assert reads == [1]


def test_a_deferred_record_of_a_refused_step_raises_its_error():
    def read():
        deferred.error = ArithmeticError("refused")

    deferred = DeferredRecord(read)
    with pytest.raises(ArithmeticError, match="refused"):
        deferred["loss"]
