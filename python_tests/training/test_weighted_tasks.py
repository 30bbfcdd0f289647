"""Training on batches with weights: padding tasks of weight 0 have no effect."""

import pytest
import torch
from trainings import assert_same_training, make_method, make_trainer, sinusoid

from imaml_ext import MAML, TaskBatch, Trainer, evaluate
from imaml_ext.training.capture import no_capture
from imaml_ext.training.recorded import RecordedMetaGradient


class Padded:
    """Sinusoids, with a padding task of NaN before them and one after."""

    def __init__(self, device, pads=True):
        self.source, self.pads = sinusoid(device), pads

    def sample(self, step):
        batch = self.source.sample(step)
        weights = torch.tensor([1.0, 4.0, 2.0, 2.0, 3.0, 0.5], device=batch.query[0].device)
        if not self.pads:
            return TaskBatch(batch.support, batch.query, weights)

        def padded(t, value):
            pad = torch.full_like(t[:1], value)
            return torch.cat([pad, t, pad])

        parts = (tuple(padded(t, torch.nan) for t in d) for d in (batch.support, batch.query))
        return TaskBatch(*parts, padded(weights, 0.0))


def trained(device, pads, capture=None):
    trainer = make_trainer(device, capture, source=Padded(device, pads), read_every=3)
    for _ in range(6):
        trainer.step()
    return trainer


@pytest.mark.usefixtures("adam_capturable_on_the_cpu_too")
def test_padding_has_no_effect_on_training(device, capture):
    want = trained(device, False)
    for each in (None, no_capture, capture):  # on the host, on the device, and recorded
        assert_same_training(trained(device, True, each), want, rtol=1e-9)


@pytest.mark.parametrize("kind", [None, MAML])
def test_a_recorded_meta_gradient_has_the_weights_of_each_batch(kind):
    method = make_method("cpu", **({} if kind is None else {"kind": kind}))
    source = Padded("cpu")
    recorded = RecordedMetaGradient(method.meta_gradient, source.sample(0))
    for step in (1, 2):
        batch = source.sample(step)
        batch.weights.mul_(torch.arange(len(batch)))  # others than when it was recorded
        got, want = recorded(batch), method.meta_gradient(batch)
        torch.testing.assert_close(got.named(), want.named(), rtol=1e-8, atol=1e-11)
        assert not got.failed.any()


def test_all_weights_0_are_an_error_not_a_step_of_0():
    method, batch = make_method("cpu"), sinusoid("cpu").sample(0)
    source = [TaskBatch(batch.support, batch.query, torch.zeros(6))]
    with pytest.raises(ValueError, match="not all 0"):
        Trainer(method, source).step()


def test_an_evaluation_has_no_weights():
    method = make_method("cpu")
    with pytest.raises(ValueError, match="evaluate counts every task once"):
        evaluate(method, Padded("cpu"), {"loss": method.loss}, tasks=4)
