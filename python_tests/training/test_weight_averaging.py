"""The moving average of the learned tensors: its values, and where it is used."""

import pytest
import torch
from trainings import RecordableWithNan, make_method, make_trainer, sinusoid

from imaml_ext import Trainer
from imaml_ext.training import average_weights, averaged, evaluate, save_model
from imaml_ext.training.capture import no_capture
from imaml_ext.training.checkpoint import evaluated_tensors, load_checkpoint

pytestmark = pytest.mark.usefixtures("adam_capturable_on_the_cpu_too")

CPU = torch.device("cpu")
DECAY = 0.7


def averaging_trainer(device=CPU, *arguments, **settings):
    trainer = make_trainer(device, *arguments, **settings)
    average_weights(trainer.optimizer, DECAY)
    return trainer


def learned(trainer):
    return {name: t.detach().clone() for name, t in trainer.method.learned().items()}


def averages_of(trainer):
    with averaged(trainer.optimizer):
        return learned(trainer)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS])
def test_the_average_is_exponential_and_starts_after_the_first_step(kind):
    method, expected = make_method(CPU), None
    trainer = Trainer(method, sinusoid(CPU), kind(method.learned().values(), lr=2**-7))
    average_weights(trainer.optimizer, DECAY)
    for _ in range(5):
        trainer.step()
        now = learned(trainer)
        if expected is None:
            expected = now
        expected = {n: DECAY * expected[n] + (1 - DECAY) * now[n] for n in now}
        for name, average in averages_of(trainer).items():
            torch.testing.assert_close(average, expected[name], rtol=1e-12, atol=1e-14)
        assert_equal(learned(trainer), now)


def test_training_is_the_same_with_averages():
    plain, averaging = make_trainer(CPU), averaging_trainer()
    for _ in range(4):
        plain.step()
        averaging.step()
    assert_equal(learned(averaging), learned(plain))


def test_the_tensors_are_restored_after_an_error():
    trainer = averaging_trainer()
    for _ in range(3):
        trainer.step()
    before = learned(trainer)
    with pytest.raises(KeyError), averaged(trainer.optimizer):
        raise KeyError
    assert_equal(learned(trainer), before)


def test_without_averages_nothing_is_replaced():
    trainer = make_trainer(CPU)
    trainer.step()
    assert_equal(averages_of(trainer), learned(trainer))


def test_validation_uses_the_averages():
    trainer = averaging_trainer()
    for _ in range(3):
        trainer.step()
    source, metrics = sinusoid(CPU), {"mse": trainer.method.loss}
    record = trainer.validate(source, metrics, tasks=4)
    plain = evaluate(trainer.method, source, metrics, tasks=4).mean["mse"]
    with averaged(trainer.optimizer):
        expected = evaluate(trainer.method, source, metrics, tasks=4).mean["mse"]
    assert record["mse"] == expected
    assert expected != plain


def test_a_resumed_training_continues_the_averages(tmp_path):
    whole, half = averaging_trainer(), averaging_trainer()
    for _ in range(3):
        whole.step()
        half.step()
    half.save(tmp_path / "checkpoint.pt")
    resumed = averaging_trainer()
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in range(3):
        whole.step()
        resumed.step()
    assert_equal(averages_of(resumed), averages_of(whole))
    assert_equal(learned(resumed), learned(whole))


def test_a_model_has_the_averages_and_a_checkpoint_both(tmp_path):
    trainer = averaging_trainer()
    for _ in range(3):
        trainer.step()
    trainer.save(tmp_path / "checkpoint.pt")
    state = load_checkpoint(tmp_path / "checkpoint.pt", training=True)
    assert_equal(state["learned"], learned(trainer))
    assert_equal(evaluated_tensors(state), averages_of(trainer))
    save_model(tmp_path / "model.pt", state)
    model = load_checkpoint(tmp_path / "model.pt")
    assert_equal(model["learned"], averages_of(trainer))
    assert model["seconds"] == trainer.seconds
    with pytest.raises(ValueError, match="contains only a model"):
        load_checkpoint(tmp_path / "model.pt", training=True)


def test_averages_are_loaded_only_where_they_are_kept(tmp_path):
    averaging, plain = averaging_trainer(), make_trainer(CPU)
    for trainer, other in ((averaging, plain), (plain, averaging)):
        trainer.step()
        trainer.save(tmp_path / "checkpoint.pt")
        before = learned(other)
        with pytest.raises(ValueError, match="call average_weights with the same decay before"):
            other.load(tmp_path / "checkpoint.pt")
        assert_equal(learned(other), before)


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "no_capture"])
def test_steps_on_the_device_update_the_averages_too(record, device, capture):
    trainer = averaging_trainer(device, capture if record else no_capture)
    expected = averaging_trainer(device)
    for _ in range(5):
        trainer.step()
        expected.step()
    for name, average in averages_of(trainer).items():
        torch.testing.assert_close(average, averages_of(expected)[name], rtol=1e-9, atol=1e-12)


def test_a_refused_step_leaves_the_averages_unchanged(device, capture):
    source = RecordableWithNan(device, 3)
    trainer = averaging_trainer(device, capture, source=source)
    for _ in range(3):
        trainer.step()
    trainer.read()
    before = averages_of(trainer)
    with pytest.raises(ArithmeticError):
        trainer.step()["loss"]
    assert_equal(averages_of(trainer), before)


def test_invalid_arguments_are_refused():
    optimizer = make_trainer(CPU).optimizer
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        average_weights(optimizer, 1.0)
    with pytest.raises(TypeError, match="optimizer must be"):
        average_weights(None, 0.5)
    average_weights(optimizer, 0.0)
    with pytest.raises(ValueError, match="already keeps averages"):
        average_weights(optimizer, 0.5)
