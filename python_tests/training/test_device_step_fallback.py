"""Steps that cannot be recorded or decided on the device: a warning, and the same training."""

import warnings

import pytest
import torch
from tape import Tape
from trainings import assert_same_training, make_method, make_trainer, sinusoid

from imaml_ext import IMAML, ProximalStrength, Trainer

pytestmark = pytest.mark.usefixtures("adam_capturable_on_the_cpu_too")


def test_a_step_that_cannot_be_recorded_runs_unrecorded_with_one_warning(device):
    def refuses(function, warmup):
        warmup()
        raise RuntimeError("operation not permitted\nand a second line")

    trainer, expected = make_trainer(device, refuses), make_trainer(device)
    trainer.step()
    with pytest.warns(UserWarning, match=r"meta-steps are not recorded: operation not permitted$"):
        trainer.step()
    for _ in range(4):
        trainer.step()
    for _ in range(6):
        expected.step()
    assert_same_training(trainer, expected)


def test_a_dense_strength_that_cannot_be_recorded_is_trained_unrecorded(device):
    # A library computes its Cholesky factor, which may not be capturable.
    def make():
        method = make_method(device)
        strength = ProximalStrength(method.params, form="dense")
        return IMAML(method.loss, method.params, lam=strength, inner=method.inner)

    tape = Tape(refuses=torch.ops.aten.linalg_cholesky_ex.default)
    trainer, expected = (make_trainer(device, c, method=make()) for c in (tape, None))
    trainer.step()
    with pytest.warns(UserWarning, match="meta-steps are not recorded: cusolver error.*cholesky"):
        trainer.step()
    for _ in range(3):
        trainer.step()
    for _ in range(5):
        expected.step()
    assert tape.recordings == 0
    assert_same_training(trainer, expected)


def test_settings_that_change_in_every_step_end_the_recording(device, capture):
    trainer, expected = make_trainer(device, capture), make_trainer(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(14):
            for t in (trainer, expected):
                t.optimizer.param_groups[0]["betas"] = (0.5 + 0.01 * step, 0.9)
                t.step()
    assert ["settings change too often" in str(w.message) for w in caught] == [True]
    assert_same_training(trainer, expected)


def test_batches_of_another_shape_end_the_recording(device, capture):
    class Growing:
        def sample(self, step):
            return sinusoid(device, 3 + (step > 3)).sample(step)

    trainer = make_trainer(device, capture, source=Growing())
    expected = make_trainer(device, source=Growing())
    for t in (trainer, expected):
        for _ in range(4):
            t.step()
    with pytest.warns(UserWarning, match=r"meta-steps are not recorded: the batch must have"):
        trainer.step()
    expected.step()
    for t in (trainer, expected):
        t.step()
        t.step()
    assert_same_training(trainer, expected)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.01), "create Adam with capturable=True"),
        (lambda p: torch.optim.SGD(p, lr=0.01), "create SGD with fused=True"),
        (lambda p: torch.optim.LBFGS(p, lr=0.01), "LBFGS is not capturable"),
    ],
    ids=["adam", "sgd", "lbfgs"],
)
def test_an_optimizer_that_needs_the_host_steps_there_with_a_warning(make, advice, device, capture):
    trainers = []
    for chosen in (capture, None):
        method = make_method(device)
        trainer = Trainer(
            method,
            sinusoid(device),
            make(list(method.learned().values())),
        )
        trainer.capture = chosen
        trainers.append(trainer)
    with pytest.warns(UserWarning, match=f"each meta-step waits for the device: {advice}"):
        trainers[0].step()
    trainers[1].step()
    for trainer in trainers:
        for _ in range(3):
            trainer.step()
    assert_same_training(*trainers)
