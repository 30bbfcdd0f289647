"""What is replayed, or decided on the device, is what would have been done step by step.

On the CPU a tape stands in for a CUDA graph: a number from the host, or a tensor that is replaced
instead of written, is as stale in its replays as in a graph's.
"""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from tape import Tape
from trainings import (
    Poisoned,
    PoisonedOnTheDevice,
    assert_close,
    assert_same_training,
    make_method,
    make_trainer,
    sinusoid,
    state_of,
)

from imaml_ext import IMAML, MAML, ProximalStrength, Trainer
from imaml_ext.training.capture import cuda_graph, no_capture
from imaml_ext.training.device_step import DeviceStep
from imaml_ext.training.trainer import NonfiniteError

pytestmark = pytest.mark.usefixtures("adam_capturable_on_the_cpu_too")


# ---- a meta-step -----------------------------------------------------------------------------


@pytest.mark.parametrize("recordable", [True, False], ids=["device-source", "host-source"])
@pytest.mark.parametrize("record", [True, False], ids=["recorded", "no_capture"])
def test_training_is_that_of_steps_decided_on_the_host(recordable, record, device, capture):
    def source():
        return None if recordable else Poisoned(device, (), ())

    capture = capture if record else no_capture
    trainer = make_trainer(device, capture, source=source(), read_every=4)
    expected = make_trainer(device, source=source())
    for _ in range(11):
        trainer.step()
        expected.step()
    assert_same_training(trainer, expected)
    if isinstance(capture, Tape):
        assert (capture.recordings, capture.replays) == (1, 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda device: make_method(device, MAML, learn_lr=True),
        lambda device: (
            lambda m: IMAML(m.loss, m.params, lam=ProximalStrength(m.params), inner=m.inner)
        )(make_method(device)),
    ],
    ids=["maml-lr", "imaml-strength"],
)
def test_what_a_method_learns_beside_theta_is_learned_in_a_recording_too(make, device, capture):
    trainer = make_trainer(device, capture, method=make(device))
    expected = make_trainer(device, method=make(device))
    for _ in range(5):
        trainer.step()
        expected.step()
    assert_same_training(trainer, expected)


def test_metrics_are_recorded_too(device, capture):
    def largest(params, data):
        return data[1].amax()

    trainer = make_trainer(device, capture, metrics={"largest": largest})
    for _ in range(4):
        trainer.step()
    source = trainer.source
    expected = [source.sample(n).query[1].amax((1, 2)).double().mean().item() for n in range(4)]
    assert [r["largest"] for r in trainer.history] == pytest.approx(expected)


def test_records_are_read_when_asked_for_or_when_enough_were_made(device, monkeypatch):
    trainer = make_trainer(device, no_capture, read_every=3)
    reads = []
    read = DeviceStep.read
    monkeypatch.setattr(DeviceStep, "read", lambda self, n: reads.append(n) or read(self, n))
    trainer.step()  # the first is decided on the host
    late = [trainer.step() for _ in range(2)]
    assert reads == []
    assert late[1]["step"] == 3  # reads both
    assert late[0]["loss"] == trainer.history[1]["loss"]
    assert reads == [range(1, 3)]
    for _ in range(3):
        trainer.step()
    assert reads == [range(1, 3), range(3, 6)]
    trainer.step()
    assert len(trainer.history) == 7
    trainer.step()
    trainer.validate(trainer.source, {"loss": trainer.method.loss}, tasks=2)
    assert reads[2:] == [range(6, 7), range(7, 8)]
    seconds = [r["seconds"] for r in trainer.history]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(trainer.seconds)


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "no_capture"])
def test_a_step_that_is_not_finite_is_refused_with_all_after_it(record, device, capture):
    capture = capture if record else no_capture
    trainer = make_trainer(device, capture, source=Poisoned(device, {5}, 2), read_every=4)
    expected = make_trainer(device)
    for _ in range(5):
        trainer.step()
        expected.step()
    trainer.read()
    before = state_of(trainer)
    assert_close(before, state_of(expected), rtol=1e-5, atol=1e-7)
    late = [trainer.step() for _ in range(3)]
    with pytest.raises(NonfiniteError, match=r"meta-step 5: .* NONFINITE: 1 of 6 tasks: 2"):
        trainer.step()
    assert_close(state_of(trainer), before, rtol=0, atol=0)
    assert trainer.steps == len(trainer.history) == 5
    assert trainer.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]
    with pytest.raises(NonfiniteError, match="meta-step 5"):
        late[2]["loss"]

    trainer.source.steps = ()  # the data is mended: the training goes on
    for _ in range(4):
        trainer.step()
        expected.step()
    assert_same_training(trainer, expected)


def test_after_a_refusal_the_refused_step_is_dealt_again(device, capture):
    trainer = make_trainer(device, capture, source=PoisonedOnTheDevice(device, 3))
    expected = make_trainer(device)
    for _ in range(6):
        trainer.step()
        expected.step()
    with pytest.raises(NonfiniteError, match="meta-step 3"):
        trainer.read()
    trainer.source.step.fill_(-1)
    for _ in range(3):
        trainer.step()
    assert_same_training(trainer, expected)


def test_a_step_before_the_one_refused_is_in_the_history(device):
    trainer = make_trainer(device, no_capture, source=Poisoned(device, {3}, 0))
    late = [trainer.step() for _ in range(5)]
    with pytest.raises(NonfiniteError, match="meta-step 3"):
        trainer.read()
    assert [r["step"] for r in trainer.history] == [1, 2, 3]
    assert late[2]["step"] == 3


def test_when_all_tasks_are_skipped_a_step_changes_nothing(device, capture):
    method = make_method(device, nonfinite="omit")
    source = Poisoned(device, {2, 4}, slice(None))
    trainer = make_trainer(device, capture, method=method, source=source)
    states = []
    for _ in range(6):
        trainer.step()
        states.append(state_of(trainer))
    for step, (a, b) in enumerate(pairwise(states), start=1):
        same = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert same == (step in source.steps)
    assert [r["failed"] for r in trainer.history] == [0, 0, 1, 0, 1, 0]


def test_tasks_that_are_skipped_are_left_out_of_a_recording_too(device, capture):
    trainers = [
        make_trainer(
            device, c, method=make_method(device, nonfinite="omit"),
            source=Poisoned(device, {1, 3}, 2),
        )
        for c in (capture, None)
    ]  # fmt: skip
    for _ in range(5):
        for trainer in trainers:
            trainer.step()
    assert_same_training(*trainers)
    assert trainers[0].history[3]["failed"] == pytest.approx(1 / 6)


def test_resuming_a_recorded_training(tmp_path, device, capture):
    whole = make_trainer(device, capture)
    for _ in range(8):
        whole.step()
    half = make_trainer(device, copy.copy(capture))
    for _ in range(5):
        half.step()
    half.save(tmp_path / "c.pt")
    resumed = make_trainer(device, copy.copy(capture))
    resumed.step()
    resumed.step()  # so that there is a recording of what load replaces
    forgotten = resumed.step()
    resumed.load(tmp_path / "c.pt")
    for _ in range(3):
        resumed.step()
    assert_same_training(resumed, whole)
    with pytest.raises(LookupError, match="forgotten when a checkpoint was loaded"):
        forgotten["loss"]


def test_a_checkpoint_can_be_loaded_in_place_of_steps_that_were_refused(tmp_path, device, capture):
    trainer = make_trainer(device, capture, source=PoisonedOnTheDevice(device, 3))
    expected = make_trainer(device)
    trainer.step()
    trainer.step()
    trainer.save(tmp_path / "c.pt")
    for _ in range(4):
        trainer.step()
    trainer.load(tmp_path / "c.pt")
    trainer.source.step.fill_(-1)
    for _ in range(3):
        trainer.step()
    for _ in range(5):
        expected.step()
    assert_same_training(trainer, expected)


def test_a_checkpoint_goes_from_one_kind_of_step_to_the_other(tmp_path, device, capture):
    expected = make_trainer(device)
    kinds = [make_trainer(device, capture), make_trainer(device, capturable=False)]
    for _ in range(3):
        kinds[0].step()
    kinds[0].save(tmp_path / "c.pt")
    kinds[1].load(tmp_path / "c.pt")
    assert kinds[1].optimizer.param_groups[0]["capturable"] is False
    for _ in range(3):
        kinds[1].step()
    kinds[1].save(tmp_path / "c.pt")
    kinds[0].load(tmp_path / "c.pt")
    assert kinds[0].optimizer.param_groups[0]["capturable"] is True
    for _ in range(3):
        kinds[0].step()
    for _ in range(9):
        expected.step()
    # capturable, Adam's bias correction is in float32: 1 - 0.999^t has 4 digits at first.
    assert_same_training(kinds[0], expected, rtol=1e-3)


def test_what_is_replaced_is_recorded_anew(device, capture):
    trainer, expected = make_trainer(device, capture), make_trainer(device)
    for t in (trainer, expected):
        for _ in range(3):
            t.step()
        t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict()))
        t.step()
        t.method.lam = 5.0
        t.step()
        t.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        t.step()
        t.source = sinusoid(device, 4, seed=3)
        for _ in range(3):
            t.step()
    assert_same_training(trainer, expected)
    if isinstance(capture, Tape):
        assert capture.recordings == 5


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
def test_a_rehearsal_is_the_whole_step_and_changes_nothing(poisoned, nonfinite, device):
    warmed_up = []

    def watching(function, warmup):
        step, optimizer = trainer._device_step, trainer.optimizer
        hook = optimizer.register_step_post_hook(lambda *_: warmed_up.append("an update"))
        gradients = [t.grad for t in trainer.method.learned().values()]

        def everything():
            tensors = [*state_of(trainer), *gradients]
            tensors += [step._records, step._refused, step._number, step._rates[0]]
            return [t.detach().cpu().numpy().tobytes() for t in tensors]

        before = everything()
        warmup()
        warmup()
        hook.remove()
        assert everything() == before
        now = [t.grad for t in trainer.method.learned().values()]
        assert all(a is b for a, b in zip(now, gradients, strict=True))
        return function

    source = PoisonedOnTheDevice(device, 1 if poisoned else -1)
    trainer = make_trainer(
        device, watching, source=source, method=make_method(device, nonfinite=nonfinite)
    )
    trainer.step()
    trainer.step()
    assert warmed_up == ["an update"] * 2


def test_a_rehearsal_that_fails_changes_nothing(device):
    def breaks_off(function, warmup):
        # In the middle of the update, when some of the state is written.
        hook = trainer.optimizer.register_step_post_hook(fails)
        before = state_of(trainer)
        with pytest.raises(RuntimeError, match="synchronizing"):
            warmup()
        hook.remove()
        assert_close(state_of(trainer), before, rtol=0, atol=0)
        return function

    def fails(*_):
        raise RuntimeError("called a synchronizing operation")

    trainer = make_trainer(device, breaks_off)
    trainer.step()
    trainer.step()


# ---- where it cannot be ----------------------------------------------------------------------


def test_what_cannot_be_recorded_is_run_as_it_is_and_says_so_once(device):
    def refuses(function, warmup):
        warmup()
        raise RuntimeError("operation not permitted\nand a second line")

    trainer, expected = make_trainer(device, refuses), make_trainer(device)
    trainer.step()
    with pytest.warns(UserWarning, match=r"run without recording them: operation not permitted$"):
        trainer.step()
    for _ in range(4):
        trainer.step()
    for _ in range(6):
        expected.step()
    assert_same_training(trainer, expected)


def test_a_dense_strength_that_cannot_be_recorded_is_trained_as_it_is(device):
    # Its Cholesky factor is a library's call, which a capture may refuse.
    def make():
        method = make_method(device)
        strength = ProximalStrength(method.params, form="dense")
        return IMAML(method.loss, method.params, lam=strength, inner=method.inner)

    tape = Tape(refuses=torch.ops.aten.linalg_cholesky_ex.default)
    trainer, expected = (make_trainer(device, c, method=make()) for c in (tape, None))
    trainer.step()
    with pytest.warns(UserWarning, match="run without recording them: cusolver error.*cholesky"):
        trainer.step()
    for _ in range(3):
        trainer.step()
    for _ in range(5):
        expected.step()
    assert tape.recordings == 0
    assert_same_training(trainer, expected)


def test_settings_that_change_in_every_step_are_not_recorded_again_and_again(device, capture):
    trainer, expected = make_trainer(device, capture), make_trainer(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(14):
            for t in (trainer, expected):
                t.optimizer.param_groups[0]["betas"] = (0.5 + 0.01 * step, 0.9)
                t.step()
    assert ["changes again and again" in str(w.message) for w in caught] == [True]
    assert_same_training(trainer, expected)


def test_batches_of_changing_shape_are_not_recorded(device, capture):
    class Growing:
        def sample(self, step):
            return sinusoid(device, 3 + (step > 3)).sample(step)

    trainer = make_trainer(device, capture, source=Growing())
    expected = make_trainer(device, source=Growing())
    for t in (trainer, expected):
        for _ in range(4):
            t.step()
    with pytest.warns(UserWarning, match=r"without recording them: the batch must be of"):
        trainer.step()
    expected.step()
    for t in (trainer, expected):
        t.step()
        t.step()
    assert_same_training(trainer, expected)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.01), "make Adam with capturable=True"),
        (lambda p: torch.optim.SGD(p, lr=0.01), "make SGD with fused=True"),
        (lambda p: torch.optim.LBFGS(p, lr=0.01), "LBFGS is not capturable"),
    ],
    ids=["adam", "sgd", "lbfgs"],
)
def test_an_optimizer_that_needs_the_host_is_asked_there(make, advice, device, capture):
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_is_decided_on_the_device(momentum, device):
    trainers = []
    for kind in (cuda_graph if device.type == "cuda" else no_capture, None):
        method = make_method(device)
        sgd = torch.optim.SGD(
            method.learned().values(), lr=2**-6, momentum=momentum, dampening=0.5 * momentum,
            fused=True,
        )  # fmt: skip
        decay = torch.optim.lr_scheduler.StepLR(sgd, 2, 0.5)
        trainers.append(Trainer(method, sinusoid(device), sgd, scheduler=decay))
        trainers[-1].capture = kind
    for trainer in trainers:
        for _ in range(6):
            trainer.step()
    assert trainers[0]._device_step is not None
    assert_same_training(*trainers)


def test_reading_less_than_every_step_is_refused():
    with pytest.raises(ValueError, match="read_every must be at least 1, got 0"):
        make_trainer("cpu", read_every=0)
