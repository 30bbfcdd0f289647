"""Logs of records: a file of JSON lines, and TensorBoard on request."""

import importlib.util
import json
import sys

import pytest
from trainings import make_method, sinusoid

from imaml_ext import Trainer
from imaml_ext.cli import main
from imaml_ext.training.logs import json_lines

QUICK = ["train", "--tasks", "3", "--inner-steps", "2", "--eval-tasks", "2", "--device", "cpu"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_training_writes_a_line_for_each_step_and_validation(tmp_path):
    assert main([*QUICK, "--meta-steps", "4", "--validations", "2", "--out", str(tmp_path)]) == 0
    found = lines(tmp_path)
    assert [(line["split"], line["step"]) for line in found] == [
        ("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4),
    ]  # fmt: skip
    assert found[0].keys() >= {"seconds", "loss", "support_loss", "linear_residual", "failed"}
    assert found[2].keys() == {"split", "step", "seconds", "loss"}


def test_lines_after_the_last_checkpoint_are_replaced(tmp_path):
    assert main([*QUICK, "--meta-steps", "3", "--validations", "1", "--out", str(tmp_path)]) == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 4, "loss": 99.0}\n{"split": "tra')  # and killed
    assert main([*QUICK, "--meta-steps", "5", "--out", str(tmp_path), "--resume"]) == 0
    steps = [line["step"] for line in lines(tmp_path) if line["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5]
    assert all(line.get("loss") != 99 for line in lines(tmp_path))


def test_non_finite_values_are_null(tmp_path):
    path = tmp_path / "log.jsonl"
    with json_lines(path, [], []) as log:
        log("train", {"step": 1, "loss": float("nan"), "failed": 1.0})
    assert json.loads(path.read_text()) == {"split": "train", "step": 1, "loss": None, "failed": 1}


def test_a_trainer_logs_to_any_function():
    seen = []
    trainer = Trainer(make_method("cpu"), sinusoid("cpu"), log=lambda *line: seen.append(line))
    trainer.step()
    trainer.validate(sinusoid("cpu", seed=9), {"loss": trainer.method.loss}, tasks=2)
    assert seen == [("train", trainer.history[0]), ("val", trainer.validation[0])]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
@pytest.mark.filterwarnings("ignore")  # warnings of tensorboard itself
def test_tensorboard_shows_each_step_once_after_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = [*QUICK, "--validations", "1", "--tensorboard", "--out", str(tmp_path)]
    assert main([*run, "--meta-steps", "3"]) == 0
    assert main([*run, "--meta-steps", "5", "--resume"]) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"train/loss", "val/loss", "train/failed"} <= set(events.Tags()["scalars"])
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5]
    expected = [line["loss"] for line in lines(tmp_path) if line["split"] == "train"]
    assert [scalar.value for scalar in scalars] == pytest.approx(expected)


def test_the_error_without_tensorboard_names_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = [*QUICK, "--meta-steps", "2", "--tensorboard", "--out", str(tmp_path / "run")]
    assert main(run) == 1
    error = capsys.readouterr().err
    assert error == "imaml-ext: error: --tensorboard needs TensorBoard: pip install tensorboard\n"
    assert not (tmp_path / "run").exists()
