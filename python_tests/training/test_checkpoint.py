"""Checkpoints: a resumed training continues bit for bit, and a bad file changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import MUTATIONS, count_refused_mutations
from torch import nn
from trainings import make_method, make_trainer, sinusoid, state_of

from imaml_ext import (
    IMAML,
    MAML,
    ConjugateGradient,
    GradientDescent,
    MultiStepLoss,
    StepSize,
    Trainer,
    module_loss,
)
from imaml_ext._io import write_atomically
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import mlp
from imaml_ext.training.checkpoint import (
    load_checkpoint,
    loading_from,
    save_checkpoint,
    save_model,
)
from imaml_ext.training.optimisation import restore_tensors

CPU = torch.device("cpu")
MODELS = Path(__file__).parents[2] / "results" / "models"


def trained(steps=0, **settings):
    trainer = make_trainer(CPU, capturable=False, **settings)
    for _ in range(steps):
        trainer.step()
    return trainer


def everything(trainer):
    """All that a checkpoint restores, as text and tensors."""
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    text = repr((trainer.steps, trainer.seconds, trainer.history, trainer.validation, rates))
    return text, trainer.scheduler.state_dict(), [*state_of(trainer), torch.get_rng_state()]


def assert_unchanged(trainer, before):
    now = everything(trainer)
    assert now[:2] == before[:2]
    for got, expected in zip(now[2], before[2], strict=True):
        assert torch.equal(got, expected)


# ---- Resuming --------------------------------------------------------------------------------


def with_learned_strength():
    lam = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    return trained(method=make_method(CPU, lam=lam))


def with_annealed_weights():
    params = make_method(CPU).params
    rate = StepSize(params, 0.005, form="tensor", steps=4)
    inner, weights = GradientDescent(lr=rate, steps=4), MultiStepLoss(4, anneal=8)
    loss = make_method(CPU).loss
    return trained(method=MAML(loss, params, inner=inner, step_weights=weights))


def with_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 9), nn.Dropout(), nn.Linear(9, 1)).double()
    loss = module_loss(model, nn.functional.mse_loss)
    inner = GradientDescent(lr=0.005, steps=3)
    method = IMAML(loss, dict(model.named_parameters()), lam=1.0, inner=inner)
    return trained(method=method)


@pytest.mark.parametrize("make", [with_learned_strength, with_annealed_weights, with_dropout])
def test_resuming_is_bit_for_bit(make, tmp_path):
    whole = make()
    for _ in range(10):
        whole.step()
    half = make()
    for _ in range(5):
        half.step()
    half.save(tmp_path / "c.pt", {"note": "kept"})
    resumed = make()
    resumed.step()  # which load has to undo
    resumed.load(tmp_path / "c.pt")
    for _ in range(5):
        resumed.step()
    assert all(map(torch.equal, state_of(whole), state_of(resumed)))
    losses = [[record["loss"] for record in t.history] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert json.loads(load_checkpoint(tmp_path / "c.pt")["config"]) == {"note": "kept"}


@pytest.mark.parametrize("stop", [2, 7])
def test_resuming_is_bit_for_bit_before_and_after_the_first_step_with_programs(
    stop, tmp_path, monkeypatch
):
    monkeypatch.setattr("imaml_ext.training.trainer._EAGER_STEPS", 4)
    whole, half, resumed = (trained(method=make_method(CPU, lam=1.0)) for _ in range(3))
    for _ in range(10):
        whole.step()
    for _ in range(stop):
        half.step()
    half.save(tmp_path / "c.pt")
    resumed.load(tmp_path / "c.pt")
    for _ in range(10 - stop):
        resumed.step()
    assert resumed.programs.describe().startswith("gradients and curvature products")
    assert all(map(torch.equal, state_of(whole), state_of(resumed)))


def test_a_state_dict_can_be_loaded_without_a_file():
    trainer, other = trained(4), trained(1)
    other.load_state_dict(trainer.state_dict())
    assert_unchanged(other, everything(trainer))
    trainer.step()
    assert other.steps == len(other.history) == 4  # shares no list


def test_a_checkpoint_of_version_0_1_is_resumed():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    method = IMAML(
        module_loss(model, nn.functional.mse_loss), dict(model.named_parameters()),
        lam=torch.tensor(3.0, requires_grad=True), inner=GradientDescent(lr=0.005, steps=2),
        linear=ConjugateGradient(max_iter=2),
    )  # fmt: skip
    adam = torch.optim.Adam(method.learned().values(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 2, 0.5)
    trainer = Trainer(method, Sinusoid(tasks=2), adam, scheduler=scheduler)
    trainer.load(Path(__file__).parent / "checkpoint-0.1.pt")
    for _ in range(3):
        trainer.step()
    # What version 0.1 itself computed; it saved the file after the third step.
    losses = [2.4972312822937965, 3.2380309104919434, 6.453220292925835]
    losses += [4.920790433883667, 2.197334587574005, 3.408251166343689]
    assert [record["loss"] for record in trainer.history] == pytest.approx(losses, rel=1e-5)
    assert [record["step"] for record in trainer.validation] == [3]
    assert adam.param_groups[0]["lr"] == 0.00125
    assert method.learned()["lam"].item() == pytest.approx(0.9714177846908569, rel=1e-5)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.pt")), ids=lambda path: path.stem)
def test_published_models_can_be_loaded(path):
    state = load_checkpoint(path)
    assert state["steps"] > 0
    assert json.loads(state["config"])["dataset"]
    assert all(tensor.isfinite().all() for tensor in state["learned"].values())


# ---- Writing ---------------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    trained().save(path)

    def crash(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, crash)
    assert load_checkpoint(path)["steps"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_config_that_json_cannot_represent_is_refused_when_saving(tmp_path):
    with pytest.raises(TypeError):
        trained().save(tmp_path / "c.pt", {"out": tmp_path})
    assert not list(tmp_path.iterdir())


def test_a_model_is_smaller_and_enough_to_evaluate_but_not_to_resume(tmp_path):
    trained(1).save(tmp_path / "whole.pt")
    save_model(tmp_path / "model.pt", load_checkpoint(tmp_path / "whole.pt", training=True))
    assert load_checkpoint(tmp_path / "model.pt")["steps"] == 1
    assert (tmp_path / "model.pt").stat().st_size < (tmp_path / "whole.pt").stat().st_size
    with pytest.raises(ValueError, match="contains only a model: it can be evaluated, not trained"):
        trained().load(tmp_path / "model.pt")


# ---- Bad files -------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*c\.pt"):
        trained().load(tmp_path / "c.pt")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    trained().save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"c.pt is truncated or not a checkpoint$"):
        trained().load(path)


def test_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    trained(1).save(path)
    content = bytearray(path.read_bytes())
    tensor = load_checkpoint(path)["learned"]["0.weight"].numpy().tobytes()
    content[content.index(tensor)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c.pt is damaged: the checksum of .* does not match$"):
        load_checkpoint(path)


def test_random_damage_is_refused_or_harmless_and_changes_nothing(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    saved, other = trained(1), trained()
    saved.save(path)
    before = everything(other)

    def read():
        try:
            other.load(path)
        except ValueError:
            assert_unchanged(other, before)
            raise
        assert all(map(torch.equal, state_of(other), state_of(saved)))
        other.__dict__.update(trained().__dict__)
        torch.set_rng_state(before[2][-1])

    assert count_refused_mutations(path, read) > 0.5 * MUTATIONS


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"text"])
def test_an_unrelated_file_is_refused(content, tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c.pt is truncated or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [torch.zeros(3), {"steps": 1}])
def test_a_torch_file_that_is_not_a_checkpoint_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is not a checkpoint of imaml_ext"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "c.pt"
    save_checkpoint(path, {"evil": Evil()})
    with pytest.raises(ValueError, match=r"c\.pt holds Python objects other than tensors"):
        load_checkpoint(path)
    assert capsys.readouterr().out == ""


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"steps": 1})
    with pytest.raises(ValueError, match=r"c\.pt is incomplete: it lacks config, learned$"):
        load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="it lacks config, history"):
        load_checkpoint(tmp_path / "c.pt", training=True)


def test_another_version_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"format": "imaml_ext checkpoint", "version": 99}, path)
    with pytest.raises(ValueError, match="version 99 checkpoint, expected 1"):
        load_checkpoint(path)


# ---- Checkpoints of other trainings ----------------------------------------------------------


def other_precision():
    return trained(2, method=make_method(CPU, dtype=torch.float32), source=Sinusoid(tasks=6))


def other_model():
    model = mlp(1, 7, 1).double()
    loss = module_loss(model, nn.functional.mse_loss)
    return trained(2, method=IMAML(loss, dict(model.named_parameters())))


def other_optimizer():
    method = make_method(CPU)
    sgd = torch.optim.SGD(method.learned().values(), lr=0.01)
    return Trainer(
        method, sinusoid(CPU), sgd, scheduler=torch.optim.lr_scheduler.StepLR(sgd, 3, 0.5)
    )


def other_scheduler():
    trainer = trained()
    trainer.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, 5)
    return trainer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_precision, r"another model: 4 tensors differ, .*torch.float32, expected .*float64"),
        (other_model, r"another model: 3 tensors .*'0.weight': got \[7, 1\] .*expected \[12, 1\]"),
        (other_optimizer, "the checkpoint was written with SGD, but the optimizer is Adam"),
        (other_scheduler, "the checkpoint was written with another scheduler, or without one"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_and_changes_nothing(make, message, tmp_path):
    make().save(tmp_path / "c.pt")
    trainer = trained(1)
    before = everything(trainer)
    with pytest.raises(ValueError, match=rf"c\.pt: .*{message}") as caught:
        trainer.load(tmp_path / "c.pt")
    assert "\n" not in str(caught.value)
    assert_unchanged(trainer, before)


def test_a_model_is_restored_or_refused_with_the_path(tmp_path):
    trainer = trained(2)
    trainer.save(tmp_path / "c.pt")
    learned = load_checkpoint(tmp_path / "c.pt")["learned"]
    target = make_method(CPU)
    restore_tensors(target.learned(), learned)
    got, expected = target.learned(), trainer.method.learned()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    message = r"c\.pt: the checkpoint belongs to another model"
    with pytest.raises(ValueError, match=message), loading_from(tmp_path / "c.pt"):
        restore_tensors(other_model().method.learned(), learned)


@pytest.mark.parametrize("entry", ["learned", "optimizer", "scheduler", "random"])
@pytest.mark.parametrize("value", [None, {}, [1], {"a": 1}, torch.zeros(2)], ids=repr)
def test_a_load_that_fails_half_way_is_undone(entry, value, tmp_path):
    path = tmp_path / "c.pt"
    trained(2).save(path)
    save_checkpoint(path, {**load_checkpoint(path, training=True), entry: value})
    trainer = trained(1)
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"c\.pt") as caught:
        trainer.load(path)
    assert "\n" not in str(caught.value)
    assert_unchanged(trainer, before)


def test_a_state_with_other_objects_cannot_be_loaded(tmp_path):
    trainer = trained(1)
    trainer.optimizer.param_groups[0]["note"] = np.random.default_rng(0)
    trainer.save(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds Python objects other than tensors and plain"):
        trained().load(tmp_path / "c.pt")
