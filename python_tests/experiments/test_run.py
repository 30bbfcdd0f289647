"""Runs: their end, their schedule, and the configs in their checkpoints."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest

from imaml_ext.experiments import run
from imaml_ext.experiments.build import build
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import CHOICES
from imaml_ext.experiments.run import resumed_config, saved_config, train_to_end
from imaml_ext.training.checkpoint import load_checkpoint
from imaml_ext.training.evaluation import evaluate


class Clock:
    """Advances by 0.5 s per call."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def test_a_run_with_a_time_limit_ends_in_time_and_its_learning_rate_decays(tmp_path, monkeypatch):
    monkeypatch.setattr("imaml_ext.training.trainer.time.perf_counter", Clock())  # 0.5 s a step
    config = dataclasses.replace(PRESETS["sinusoid"], tasks=2, minutes=10 / 60, meta_steps=10**6)
    one = build(config)
    trainer = one.trainer()
    rates = []
    step = trainer.step

    def noted_step():
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step()

    monkeypatch.setattr(trainer, "step", noted_step)
    train_to_end(one, trainer, tmp_path / "c.pt", validations=4)
    assert trainer.steps == 20
    assert trainer.seconds == 10
    assert rates[:10] == [config.meta_lr] * 10
    assert all(a > b for a, b in pairwise(rates[11:]))
    assert rates[-1] < 0.25 * config.meta_lr
    assert [record["step"] for record in trainer.validation] == [5, 10, 15, 20]


def test_the_progress_bar_shows_the_minutes_used_without_those_of_validation(
    tmp_path, monkeypatch, capsys
):
    clock = Clock()

    def slow_evaluate(*arguments, **settings):
        clock.now += 1000
        return evaluate(*arguments, **settings)

    monkeypatch.setattr("imaml_ext.training.trainer.time.perf_counter", clock)
    monkeypatch.setattr("imaml_ext.training.trainer.evaluate", slow_evaluate)
    monkeypatch.setattr(run, "_SHOWN_EVERY", 0.0)
    config = dataclasses.replace(PRESETS["sinusoid"], tasks=2, inner_steps=1, minutes=0.5)
    one = build(config)
    trainer = one.trainer()
    train_to_end(one, trainer, tmp_path / "c.pt", validations=3)
    assert trainer.steps == 60  # of 0.5 s each
    shown = capsys.readouterr().err
    assert "0.3 of 0.5 min, loss=" in shown
    assert "0.5 of 0.5 min, loss=" in shown


def test_values_that_version_0_1_wrote_are_translated():
    expected = dataclasses.replace(
        PRESETS["sinusoid"], nonfinite="propagate", linear="cg-authors-code", lam=0.7
    )
    old = vars(expected) | {"nonfinite": "refuse", "linear": "cg-reference-code"}
    assert saved_config({"config": json.dumps(old)}, Path("c.pt")) == expected
    old["nonfinite"] = "skip"
    assert saved_config({"config": json.dumps(old)}, Path("c.pt")).nonfinite == "omit"


@pytest.mark.parametrize("config", ["", "3", "[1]", "{}", '{"dataset": "sinusoid", "x": 1}'])
def test_a_checkpoint_without_a_valid_config_is_refused(config):
    with pytest.raises(ValueError, match=r"^c\.pt was not written by imaml-ext train"):
        saved_config({"config": config}, Path("c.pt"))


def test_the_published_models_have_configs_of_this_version():
    models = sorted((Path(__file__).parents[2] / "results" / "models").glob("*.pt"))
    if not models:
        pytest.skip("no published models")
    for path in models:
        config = saved_config(load_checkpoint(path), path)
        assert all(getattr(config, name) in choices for name, choices in CHOICES.items())


@pytest.fixture
def checkpoint(tmp_path):
    config = dataclasses.replace(PRESETS["sinusoid"], tasks=2, inner_steps=1, meta_steps=2)
    one = build(config)
    train_to_end(one, one.trainer(), tmp_path / "c.pt", validations=0)
    return tmp_path / "c.pt"


def test_a_resumed_run_can_change_only_its_length(checkpoint):
    config = resumed_config(checkpoint, {"meta_steps": 5, "nonfinite": "omit", "inner_steps": 1})
    assert (config.meta_steps, config.nonfinite, config.tasks) == (5, "omit", 2)
    for name, value in {"inner_steps": 3, "dataset": "omniglot", "seed": 1}.items():
        with pytest.raises(ValueError, match=f"was trained with {name}=.*, got {value}: a resumed"):
            resumed_config(checkpoint, {name: value})


def test_a_resumed_run_continues_from_the_checkpoint(checkpoint, capsys):
    one = build(resumed_config(checkpoint, {"meta_steps": 5}))
    trainer = one.trainer()
    train_to_end(one, trainer, checkpoint, resume=True, validations=0)
    assert "resuming from meta-step 2" in capsys.readouterr().err
    assert [record["step"] for record in trainer.history] == [1, 2, 3, 4, 5]
    lines = (checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
