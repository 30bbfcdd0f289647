"""The command line: what it trains, prints and refuses."""

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from imaml_ext import Trainer, cli
from imaml_ext.cli import main
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.build import build
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.training.checkpoint import load_checkpoint, save_checkpoint

QUICK = ["--meta-steps", "4", "--tasks", "3", "--inner-steps", "2", "--eval-tasks", "5"]


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.renders
def test_train_and_eval_agree(tmp_path, capsys):
    assert main(["train", *QUICK, "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]) == 0
    trained = last_json(capsys)
    assert trained["tasks"] == 5
    assert trained["meta_steps"] == 4
    assert [path.rsplit("/", 1)[1] for path in trained["plots"]] == [
        "learning_curves.png",
        "fits.png",
    ]
    assert all((tmp_path / "run" / p.rsplit("/", 1)[1]).stat().st_size for p in trained["plots"])
    arguments = ["eval", trained["checkpoint"], "--eval-tasks", "5", "--device", "cpu", "--json"]
    assert main(arguments) == 0
    evaluated = last_json(capsys)
    assert evaluated["loss"] == trained["loss"]
    assert evaluated["plots"] == [trained["plots"][1]]


def test_the_plot_of_a_model_outside_a_run_goes_to_a_folder_of_its_own(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--device", "cpu", "--out", "run"]) == 0
    os.rename("run/checkpoint.pt", "run/best.pt")
    evaluate = ["eval", "run/best.pt", "--eval-tasks", "2", "--device", "cpu", "--json"]
    assert main(evaluate) == 0
    assert last_json(capsys)["plots"] == ["runs/best/fits.png"]
    assert main([*evaluate, "--out", "elsewhere"]) == 0
    assert last_json(capsys)["plots"] == ["elsewhere/fits.png"]


def test_a_training_says_first_what_it_will_do_and_where(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", *QUICK, "--device", "cpu", "--out", out, "--minutes", "0.5"]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        "imaml on sinusoid: at most 0.5 minutes or 4 meta-steps of 3 tasks, on the CPU, 1 thread; "
        f"results in {out}"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--metasteps", "3"], "--metasteps: did you mean --meta-steps?"),
        (["train", "omniglot", "--minute=3", "--shots=1"], "--shots: did you mean --shot?"),
        (["eval", "checkpoint.pt", "--innner-lr", "1"], "--innner-lr: did you mean --inner-lr?"),
        (["eval", "checkpoint.pt", "--way", "5"], "there is no option --way\n"),
        (["reproduce", "table2", "--minuts", "3"], "--minuts: did you mean --minutes?"),
        (["trian", "--data", "x"], "invalid choice: 'trian'"),
        (["train", "--qqqqqqqq"], "there is no option --qqqqqqqq\n"),
        (["train", "sinusoid", "omniglot"], "unrecognized arguments: omniglot"),
    ],
)
def test_the_error_for_an_unknown_option_names_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_averaged_tensors_are_evaluated_after_training_and_later(tmp_path, capsys):
    run = ["train", *QUICK, "--device", "cpu", "--out", str(tmp_path), "--average", "0.9", "--json"]
    assert main(run) == 0
    trained = last_json(capsys)
    arguments = ["eval", trained["checkpoint"], "--eval-tasks", "5", "--device", "cpu", "--json"]
    assert main(arguments) == 0
    assert last_json(capsys)["loss"] == trained["loss"]
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    save_checkpoint(tmp_path / "last.pt", state | {"averages": {}})
    assert main(["eval", str(tmp_path / "last.pt"), *arguments[2:]]) == 0
    assert last_json(capsys)["loss"] != trained["loss"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_ended_is_not_an_error_to_report(
    unbuffered, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    assert main(["train", *QUICK, "--device", "cpu", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "imaml_ext", "eval", str(tmp_path), "--device", "cpu"]
    ended = subprocess.run(  # not in the source folder, whose package may not be built
        command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
    )
    os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == 1


def test_another_broken_pipe_is_reported(monkeypatch, capfd):
    def failing(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_eval", failing)
    with monkeypatch.context() as patched, open(os.devnull, "w") as read:
        patched.setattr(sys, "stdout", read)
        assert main(["eval", "run"]) == 1
    assert "error: [Errno 32] Broken pipe" in capfd.readouterr().err


def test_a_training_can_start_from_another(tmp_path, capsys, monkeypatch):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    common = ["--device", "cpu", "--json", "--out"]
    assert main(["train", *QUICK, *common, first]) == 0
    step = Trainer.step
    begun = []

    def seen_step(trainer):
        begun.append({n: t.detach().clone() for n, t in trainer.method.params.items()})
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", seen_step)
    start = ["--start", f"{first}/checkpoint.pt"]
    assert main(["train", *QUICK, "--seed", "1", *start, *common, second]) == 0
    for name, tensor in load_checkpoint(tmp_path / "first" / "checkpoint.pt")["learned"].items():
        assert torch.equal(begun[0][name], tensor)
    # Evaluation does not need the model from which training started.
    (tmp_path / "first" / "checkpoint.pt").unlink()
    assert main(["eval", second, "--eval-tasks", "5", "--device", "cpu"]) == 0
    capsys.readouterr()


def test_compiled_training_ends_where_eager_training_does(tmp_path, capsys):
    losses = []
    for choice in ("off", "auto", "on"):
        arguments = ["train", *QUICK, "--device", "cpu", "--out", str(tmp_path / choice)]
        arguments += ["--compile", choice, "--meta-steps", "25", "--json"]
        assert main(arguments) == 0
        printed = capsys.readouterr()
        losses.append(json.loads(printed.out.splitlines()[-1])["loss"])
        assert printed.err.count("run as recorded programs") == (choice != "off")
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, capsys, monkeypatch):
    def train(out, *more):
        return main(["train", "--device", "cpu", "--out", str(tmp_path / out), "--json", *more])

    assert train("whole", *QUICK) == 0
    whole = last_json(capsys)["loss"]

    step = Trainer.step

    def interrupted_step(trainer):
        if trainer.steps == 1:
            os.kill(os.getpid(), signal.SIGINT)  # during the second step
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    assert train("cut", *QUICK) == 130
    assert "--resume" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["steps"] == 2
    monkeypatch.setattr(Trainer, "step", step)
    assert train("cut", "--resume", "--eval-tasks", "5") == 0
    assert last_json(capsys)["loss"] == whole


@pytest.mark.parametrize(
    "settings",
    [
        ["--method", "maml", "--learn-lr"],
        ["--method", "maml-accelerated"],
        ["--method", "truncated-maml", "--last", "1"],
        ["--method", "fomaml"],
        ["--method", "reptile"],
        ["--inner", "nesterov", "--linear", "minres"],
        ["--inner", "adam", "--linear", "neumann"],
        ["--inner", "hessian-free", "--linear", "cg-jacobi", "--learn-lam", "diagonal"],
        ["--inner", "lbfgs", "--learn-lam", "scalar"],
    ],
    ids=" ".join,
)
def test_every_method_and_solver_trains_and_is_evaluated(settings, tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(["train", *QUICK, *out, *settings]) == 0
    trained = last_json(capsys)
    for saved in (trained["checkpoint"], str(tmp_path)):  # also the folder of the run
        assert main(["eval", saved, "--eval-tasks", "5", "--json"]) == 0
        assert last_json(capsys)["loss"] == trained["loss"]


def test_another_method_can_adapt_in_evaluation(tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(["train", *QUICK, *out]) == 0
    loss = last_json(capsys)["loss"]
    arguments = ["eval", str(tmp_path / "checkpoint.pt"), "--eval-tasks", "5", "--json"]
    assert main([*arguments, "--method", "maml"]) == 0  # without the proximal term
    assert last_json(capsys)["loss"] != loss
    assert main([*arguments, "--inner", "lbfgs"]) == 0
    assert last_json(capsys)["loss"] != loss


def test_evaluation_can_adapt_differently(tmp_path, capsys):
    assert main(["train", *QUICK, "--device", "cpu", "--out", str(tmp_path), "--json"]) == 0
    loss = last_json(capsys)["loss"]
    checkpoint = str(tmp_path / "checkpoint.pt")
    arguments = ["eval", checkpoint, "--eval-tasks", "5", "--inner-steps", "0", "--json"]
    assert main(arguments) == 0
    assert last_json(capsys)["loss"] != loss


def test_resuming_a_finished_run_evaluates_it_again(tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path), "--eval-tasks", "5", "--json"]
    assert main(["train", *QUICK, *out]) == 0
    loss = last_json(capsys)["loss"]
    assert main(["train", *out, "--resume"]) == 0
    again = last_json(capsys)
    assert (again["loss"], again["meta_steps"]) == (loss, 4)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", lambda *_, device: None)  # works without a GPU


@pytest.fixture
def cpu_build(monkeypatch):
    monkeypatch.setattr(cli, "build_info", lambda: {"cuda": ""})


AUTO = argparse.Namespace(device="auto")


def test_auto_chooses_the_gpu_if_the_build_has_kernels(gpu, monkeypatch, capsys):
    monkeypatch.setattr(cli, "build_info", lambda: {"cuda": "13.0"})
    assert cli._device(AUTO).type == "cuda"
    assert capsys.readouterr().err == ""


def test_an_unused_gpu_is_reported_once(gpu, cpu_build, monkeypatch, capsys):
    notice = (
        r"imaml-ext: the GPU is not used: .* without CUDA kernels: reinstall .*`pip install .*\n"
    )
    assert cli._device(AUTO).type == "cpu"
    captured = capsys.readouterr()
    assert re.fullmatch(notice, captured.err)
    assert captured.out == ""
    monkeypatch.setattr(cli, "is_launched", lambda: True)
    for rank, expected in (("0", notice), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli._device(AUTO).type == "cpu"
        assert re.fullmatch(expected, capsys.readouterr().err)


def test_choosing_the_cpu_without_a_gpu_or_on_request_prints_nothing(
    gpu, cpu_build, monkeypatch, capsys
):
    assert cli._device(argparse.Namespace(device="cpu")).type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli._device(AUTO).type == "cpu"
    assert capsys.readouterr().err == ""


def test_requesting_a_gpu_that_a_cpu_build_cannot_use_is_an_error_with_the_remedy(gpu, cpu_build):
    with pytest.raises(ValueError, match=r"^--device cuda: .*reinstall .*`pip install "):
        cli._device(argparse.Namespace(device="cuda"))


def test_a_checkpoint_not_written_by_the_command_line_is_refused(tmp_path, capsys):
    trainer = build(PRESETS["sinusoid"]).trainer()
    trainer.save(tmp_path / "c.pt", {"mine": 1})
    assert "was not written by imaml-ext" in fails(["eval", str(tmp_path / "c.pt")], capsys)


def fails(arguments, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("imaml-ext: error: ")
    assert "Traceback" not in captured.err
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "omniglot", "--data", "nowhere"], "no Omniglot: expected nowhere/omniglot-py"),
        (["train", "--lam", "-1"], "lam must be positive and finite, or 0, got -1.0"),
        (["train", "--lam", "nan"], "lam must be positive and finite, or 0, got nan"),
        (["train", "--inner-lr", "0"], "lr must be positive and finite, got 0.0"),
        (["train", "--inner-steps", "-1"], "steps must be at least 0, got -1"),
        (["train", "--cg-steps", "0"], "max_iter must be at least 1"),
        (["train", "--tasks", "0"], "tasks must be at least 1"),
        (["train", "--meta-steps", "0"], "--meta-steps must be finite and at least 1, got 0"),
        (["train", "--eval-tasks", "0"], "--eval-tasks must be finite and at least 1, got 0"),
        (["train", "--validations", "0"], "--validations must be finite and at least 1, got 0"),
        (["train", "--save-every", "nan"], "--save-every must be finite and non-negative, got nan"),
        (["train", "--save-every", "-1"], "--save-every must be finite and non-negative, got -1.0"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["train", "--method", "maml", "--learn-lam", "scalar"], "learn_lam is for imaml"),
        (["train", "--method", "maml", "--inner", "adam"], "inner is for imaml"),
        (["train", "--method", "fomaml", "--learn-lr"], "learn_lr is for maml"),
        (["train", "--learn-lr"], "learn_lr is for maml"),
        (["train", "--start", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["train", "--average", "1"], "average must be in [0, 1), got 1.0"),
        (["train", "--query-scale", "0"], "query_scale must be positive"),
        (["train", "--hard-tasks", "0.5"], "hard_tasks needs images, and start"),
        (["train", "--train-way", "80"], "train_way is for ridge-head, got 80"),
        (["train", "--method", "ridge-head"], "ridge-head is for classification"),
        (["train", "--resume"], "--resume needs --out, the folder of the run"),
        (["train", "--resume", "--out", "nowhere"], "no checkpoint at nowhere/checkpoint.pt"),
        (["eval", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    ],
)
def test_bad_arguments_fail_in_one_line_and_write_nothing(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_overwritten(tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", *QUICK, *out]) == 0
    assert "resume it with --resume" in fails(["train", *QUICK, *out], capsys)


def test_a_resumed_run_keeps_its_settings(tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", *QUICK, *out]) == 0
    message = fails(["train", *out, "--resume", "--lam", "9"], capsys)
    assert "was trained with lam=0." in message
    assert main(["train", *out, "--resume", "--meta-steps", "6", "--eval-tasks", "2"]) == 0


def test_a_resumed_run_keeps_its_data_set(small_omniglot, tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(["train", "omniglot", *QUICK, "--query", "1", *out]) == 0
    assert main(["train", *out, "--resume", "--meta-steps", "6", "--eval-tasks", "2"]) == 0
    resumed = last_json(capsys)
    assert resumed["meta_steps"] == 6
    assert "accuracy" in resumed
    message = fails(["train", "sinusoid", *out, "--resume"], capsys)
    assert "was trained with dataset=omniglot" in message


def test_an_unwritable_folder_fails_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = ["--out", str(tmp_path / "file" / "run")]
    assert "Not a directory" in fails(["train", *QUICK, *out], capsys)
    out = ["--out", str(tmp_path / "file")]
    assert f"{tmp_path / 'file'} is not a folder" in fails(["train", *QUICK, *out], capsys)


def test_a_nonfinite_step_is_refused_and_the_state_before_it_saved(tmp_path, capsys, monkeypatch):
    out = ["--device", "cpu", "--out", str(tmp_path), "--eval-tasks", "5", "--json"]
    sample = Sinusoid.sample

    def sample_infinity(source, step):
        batch = sample(source, step)
        if step == 2 and source.shot == 10 and source.tasks == 3:
            batch.support[1][1] = torch.inf
        return batch

    monkeypatch.setattr(Sinusoid, "sample", sample_infinity)
    message = fails(["train", *QUICK, *out], capsys)
    assert "meta-step 2: the meta-gradient is not finite" in message
    assert "NONFINITE: 1 of 3 tasks: 1 (" in message
    state = load_checkpoint(tmp_path / "checkpoint.pt", training=True)
    assert state["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in state["learned"].values())
    assert main(["train", *out, "--resume", "--nonfinite", "omit"]) == 0
    assert last_json(capsys)["meta_steps"] == 4
    state = load_checkpoint(tmp_path / "checkpoint.pt", training=True)
    assert [record["failed"] for record in state["history"]] == [0, 0, pytest.approx(1 / 3), 0]
    assert all(tensor.isfinite().all() for tensor in state["learned"].values())
