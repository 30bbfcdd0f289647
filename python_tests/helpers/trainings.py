"""Small trainings, decided on the host or on the device, and their comparison."""

import pytest
import torch
from torch import nn

from imaml_ext import IMAML, ConjugateGradient, GradientDescent, TaskBatch, Trainer, module_loss
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import mlp


def make_method(device, kind=IMAML, *, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = mlp(1, 12, 1).to(device, dtype)
    loss = module_loss(model, nn.functional.mse_loss)
    if kind is IMAML:
        settings = {"lam": 1.0, "linear": ConjugateGradient(max_iter=3), **settings}
    return kind(
        loss, dict(model.named_parameters()), inner=GradientDescent(lr=0.005, steps=4), **settings
    )


def sinusoid(device, tasks=6, **settings):
    return Sinusoid(tasks=tasks, device=device, dtype=torch.float64, **settings)


def on_the_device(optimizer, params, **settings):
    """An optimizer that is capturable, or for SGD fused, on CUDA."""
    params = list(params)
    name = "fused" if optimizer is torch.optim.SGD else "capturable"
    return optimizer(params, **settings, **{name: True} if params[0].is_cuda else {})


def make_trainer(
    device, capture=None, *, source=None, decay=0.5, method=None, capturable=True, **settings
):
    method = method or make_method(device)
    adam = torch.optim.Adam(method.learned().values(), lr=2**-7, capturable=capturable)
    trainer = Trainer(
        method, source or sinusoid(device), adam,
        scheduler=torch.optim.lr_scheduler.StepLR(adam, 3, decay), capture=capture, **settings,
    )  # fmt: skip
    if capture is None:
        trainer.capture = None  # the default differs on CUDA
    return trainer


def state_of(trainer):
    """Copies of the learned tensors and of the optimizer's state."""
    learned = [t.detach().clone() for t in trainer.method.learned().values()]
    states = trainer.optimizer.state.values()
    return learned + [v.clone() for s in states for v in s.values() if isinstance(v, torch.Tensor)]


def assert_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), **tolerance)


def assert_same_training(got, expected, rtol=1e-5):
    assert_close(state_of(got), state_of(expected), rtol=rtol, atol=rtol / 100)
    assert len(got.history) == len(expected.history) == got.steps == expected.steps
    for a, b in zip(got.history, expected.history, strict=True):
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, rel=rtol, abs=rtol / 100
        )
    rates = [[g["lr"] for g in t.optimizer.param_groups] for t in (got, expected)]
    assert rates[0] == rates[1]


class WithNan:
    """Sinusoids with NaN targets in some tasks of some steps. Takes the step only as an int."""

    def __init__(self, device, steps, tasks):
        self.finite, self.steps, self.nan_tasks = sinusoid(device), steps, tasks

    def sample(self, step):
        assert isinstance(step, int)
        batch = self.finite.sample(step)
        if step in self.steps:
            batch.support[1][self.nan_tasks] = torch.nan
        return batch


class RecordableWithNan:
    """Sinusoids with NaN targets in all tasks of one step, which may be a tensor."""

    recordable = True

    def __init__(self, device, step):
        self.finite, self.step = sinusoid(device), torch.tensor(step, device=device)

    def sample(self, step):
        batch = self.finite.sample(step)
        x, y = batch.support
        return TaskBatch((x, torch.where(self.step == step, torch.nan, y)), batch.query)
