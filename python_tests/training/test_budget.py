"""Budgets: what counts as progress, and when it is updated."""

import gc
import math
import weakref

import pytest
import torch

from imaml_ext import IMAML, GradientDescent, Trainer
from imaml_ext.data import Sinusoid
from imaml_ext.problem.module_loss import module_loss
from imaml_ext.training import Budget


@pytest.mark.parametrize(
    ("limits", "steps", "seconds", "progress"),
    [
        ({}, 1000, 1e6, 0.0),
        ({"steps": 40}, 10, 1e6, 0.25),
        ({"minutes": 2}, 1000, 30.0, 0.25),
        ({"steps": 40, "minutes": 2}, 10, 12.0, 0.25),
        ({"steps": 40, "minutes": 2}, 10, 180.0, 1.5),
    ],
)
def test_progress_is_the_larger_share_of_the_limits(limits, steps, seconds, progress):
    budget = Budget(**limits)
    assert budget.progress == 0
    budget.update(steps=steps, seconds=seconds)
    assert budget.progress == progress


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"minutes": -1.0}, "minutes must be finite and non-negative, got -1.0"),
        ({"minutes": math.nan}, "minutes must be finite and non-negative, got nan"),
    ],
)
def test_invalid_limits_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Budget(**limits)


def make_trainer():
    model = torch.nn.Linear(1, 1)
    method = IMAML(
        module_loss(model, torch.nn.functional.mse_loss),
        dict(model.named_parameters()),
        inner=GradientDescent(lr=0.01, steps=2),
    )
    optimizer = torch.optim.SGD(method.learned().values(), lr=1.0)
    budget = Budget(steps=8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - budget.progress)
    return Trainer(method, Sinusoid(tasks=2), optimizer, scheduler=scheduler, budget=budget)


def test_the_trainer_updates_the_budget_before_the_schedule_reads_it(tmp_path):
    trainer = make_trainer()
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step()
    assert rates == [1, 7 / 8, 6 / 8, 5 / 8]
    assert trainer.budget.progress == 0.5
    trainer.save(tmp_path / "c.pt")
    resumed = make_trainer()
    resumed.load(tmp_path / "c.pt")
    assert resumed.budget.progress == 0.5
    assert resumed.optimizer.param_groups[0]["lr"] == 0.5
    resumed.step()
    assert resumed.optimizer.param_groups[0]["lr"] == 3 / 8


def test_a_trainer_whose_schedule_reads_its_budget_is_freed_without_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        trainer = make_trainer()
        trainer.step()
        freed = weakref.ref(trainer)
        del trainer
        assert freed() is None
    finally:
        gc.enable()
