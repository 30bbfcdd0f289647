"""Steps that are decided on the device, and recorded, equal those decided on the host.

On the CPU a `Tape` replaces the CUDA graph: like a graph, it replays numbers from the host, and
tensors that were replaced instead of written, with their old values.
"""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from tape import Tape
from trainings import (
    RecordableWithNan,
    WithNan,
    assert_close,
    assert_same_training,
    make_method,
    make_trainer,
    sinusoid,
    state_of,
)

from imaml_ext import IMAML, MAML, MultiStepLoss, ProximalStrength, Trainer
from imaml_ext.training.capture import cuda_graph, no_capture
from imaml_ext.training.device_step import DeviceStep
from imaml_ext.training.trainer import NonfiniteError

pytestmark = pytest.mark.usefixtures("adam_capturable_on_the_cpu_too")


@pytest.mark.parametrize("recordable", [True, False], ids=["device-source", "host-source"])
@pytest.mark.parametrize("record", [True, False], ids=["recorded", "no_capture"])
def test_training_equals_that_of_steps_decided_on_the_host(recordable, record, device, capture):
    def source():
        return None if recordable else WithNan(device, (), ())

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
        lambda device: make_method(
            device, MAML, learn_lr=True, lam=1.0, step_weights=MultiStepLoss(4, anneal=3)
        ),
        lambda device: (
            lambda m: IMAML(m.loss, m.params, lam=ProximalStrength(m.params), inner=m.inner)
        )(make_method(device)),
    ],
    ids=["maml-lr", "maml-weighted", "imaml-strength"],
)
def test_step_sizes_and_strengths_are_learned_in_a_recording_too(make, device, capture):
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


def test_records_are_read_when_accessed_or_when_enough_are_pending(device, monkeypatch):
    trainer = make_trainer(device, no_capture, read_every=3)
    reads = []
    read = DeviceStep.read
    monkeypatch.setattr(DeviceStep, "read", lambda self, n: reads.append(n) or read(self, n))
    trainer.step()  # the first step is decided on the host
    deferred = [trainer.step() for _ in range(2)]
    assert reads == []
    assert deferred[1]["step"] == 3  # reads both pending steps
    assert deferred[0]["loss"] == trainer.history[1]["loss"]
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
def test_a_non_finite_step_is_refused_with_all_later_ones(record, device, capture):
    capture = capture if record else no_capture
    trainer = make_trainer(device, capture, source=WithNan(device, {5}, 2), read_every=4)
    expected = make_trainer(device)
    for _ in range(5):
        trainer.step()
        expected.step()
    trainer.read()
    before = state_of(trainer)
    assert_close(before, state_of(expected), rtol=1e-5, atol=1e-7)
    deferred = [trainer.step() for _ in range(3)]
    with pytest.raises(NonfiniteError, match=r"meta-step 5: .* NONFINITE: 1 of 6 tasks: 2"):
        trainer.step()
    assert_close(state_of(trainer), before, rtol=0, atol=0)
    assert trainer.steps == len(trainer.history) == 5
    assert trainer.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]
    with pytest.raises(NonfiniteError, match="meta-step 5"):
        deferred[2]["loss"]

    trainer.source.steps = ()  # the data is repaired, and training continues
    for _ in range(4):
        trainer.step()
        expected.step()
    assert_same_training(trainer, expected)


def test_after_a_refusal_the_refused_step_is_sampled_again(device, capture):
    trainer = make_trainer(device, capture, source=RecordableWithNan(device, 3))
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
    trainer = make_trainer(device, no_capture, source=WithNan(device, {3}, 0))
    deferred = [trainer.step() for _ in range(5)]
    with pytest.raises(NonfiniteError, match="meta-step 3"):
        trainer.read()
    assert [r["step"] for r in trainer.history] == [1, 2, 3]
    assert deferred[2]["step"] == 3


def test_a_step_whose_tasks_are_all_omitted_changes_nothing(device, capture):
    method = make_method(device, nonfinite="omit")
    source = WithNan(device, {2, 4}, slice(None))
    trainer = make_trainer(device, capture, method=method, source=source)
    states = []
    for _ in range(6):
        trainer.step()
        states.append(state_of(trainer))
    for step, (a, b) in enumerate(pairwise(states), start=1):
        same = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert same == (step in source.steps)
    assert [r["failed"] for r in trainer.history] == [0, 0, 1, 0, 1, 0]


def test_failed_tasks_are_omitted_in_a_recording_too(device, capture):
    trainers = [
        make_trainer(
            device, c, method=make_method(device, nonfinite="omit"),
            source=WithNan(device, {1, 3}, 2),
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
    resumed.step()  # so that load replaces what was recorded
    dropped = resumed.step()
    resumed.load(tmp_path / "c.pt")
    for _ in range(3):
        resumed.step()
    assert_same_training(resumed, whole)
    with pytest.raises(LookupError, match="was dropped when a checkpoint was loaded"):
        dropped["loss"]


def test_loading_a_checkpoint_discards_refused_steps(tmp_path, device, capture):
    trainer = make_trainer(device, capture, source=RecordableWithNan(device, 3))
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


def test_checkpoints_are_the_same_for_both_kinds_of_steps(tmp_path, device, capture):
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
    # A capturable Adam corrects its bias in float32, where 1 - 0.999^t has 4 digits at first.
    assert_same_training(kinds[0], expected, rtol=1e-3)


def test_replaced_objects_are_recorded_again(device, capture):
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


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
def test_a_warm_up_is_the_whole_step_and_changes_nothing(nan, nonfinite, device):
    updates = []

    def watching(function, warmup):
        step, optimizer = trainer._device_step, trainer.optimizer
        hook = optimizer.register_step_post_hook(lambda *_: updates.append("an update"))
        gradients = [t.grad for t in trainer.method.learned().values()]

        def everything():
            tensors = [*state_of(trainer), *gradients]
            tensors += [step._records, step._refused, step._step_number, step._rates[0]]
            return [t.detach().cpu().numpy().tobytes() for t in tensors]

        before = everything()
        warmup()
        warmup()
        hook.remove()
        assert everything() == before
        now = [t.grad for t in trainer.method.learned().values()]
        assert all(a is b for a, b in zip(now, gradients, strict=True))
        return function

    source = RecordableWithNan(device, 1 if nan else -1)
    trainer = make_trainer(
        device, watching, source=source, method=make_method(device, nonfinite=nonfinite)
    )
    trainer.step()
    trainer.step()
    assert updates == ["an update"] * 2


def test_a_warm_up_that_fails_changes_nothing(device):
    def stops_in_the_update(function, warmup):
        # After the parameters and some of the state were written.
        hook = trainer.optimizer.register_step_post_hook(fails)
        before = state_of(trainer)
        with pytest.raises(RuntimeError, match="synchronizing"):
            warmup()
        hook.remove()
        assert_close(state_of(trainer), before, rtol=0, atol=0)
        return function

    def fails(*_):
        raise RuntimeError("called a synchronizing operation")

    trainer = make_trainer(device, stops_in_the_update)
    trainer.step()
    trainer.step()


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


@pytest.mark.parametrize("kind", [cuda_graph, no_capture])
def test_a_device_step_is_freed_without_the_collector(kind, device, capture):
    # It holds the recording's memory and the process group.
    capture = capture if kind is cuda_graph else no_capture
    make_trainer(device)  # the first optimizer of a process keeps its caller's frame
    gc.collect()
    gc.disable()
    try:
        trainer = make_trainer(device, capture)
        for _ in range(3):
            trainer.step()
        trainer.read()
        freed = [weakref.ref(trainer), weakref.ref(trainer._device_step)]
        del trainer
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()
