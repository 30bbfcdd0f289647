"""The outer loop: which tensors are learned, and that steps with non-finite tasks are refused."""

import gc
import weakref

import pytest
import torch
from torch import nn
from trainings import WithNan, make_method, sinusoid, state_of

from imaml_ext import FOMAML, IMAML, GradientDescent, TaskBatch, Trainer, evaluate, module_loss
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import mlp
from imaml_ext.training.capture import no_capture
from imaml_ext.training.trainer import NonfiniteError

CPU = torch.device("cpu")


def assert_unchanged(trainer, before):
    for got, expected in zip(state_of(trainer), before, strict=True):
        assert torch.equal(got, expected)


def test_lam_is_learned_when_it_requires_grad(device):
    lam = torch.tensor(1.0, dtype=torch.float64, device=device, requires_grad=True)
    trainer = Trainer(make_method(device, lam=lam), sinusoid(device))
    assert "lam" in trainer.method.learned()
    trainer.step()
    assert lam.grad is not None
    assert lam.item() != 1.0


def test_a_lam_per_parameter_is_learned_too(device):
    start = make_method(device).params
    lam = {name: torch.ones_like(t).requires_grad_() for name, t in start.items()}
    Trainer(make_method(device, lam=lam), sinusoid(device)).step()
    assert all((tensor != 1).any() for tensor in lam.values())


def test_a_parameter_that_is_frozen_or_misnamed_is_refused():
    loss = module_loss(nn.Linear(1, 1), nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"params\['weight'\] does not require grad"):
        IMAML(loss, {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"params\['lam'\]"):
        IMAML(loss, {"lam": torch.zeros(1, requires_grad=True)})


def test_a_parameter_that_is_left_out_is_neither_adapted_nor_learned():
    model = mlp(1, 5, 1)
    loss = module_loss(model, nn.functional.mse_loss)
    before = {name: t.detach().clone() for name, t in model.named_parameters()}
    head = {name: t for name, t in model.named_parameters() if name.startswith("2.")}
    model[0].requires_grad_(False)
    trainer = Trainer(IMAML(loss, head, lam=1.0), Sinusoid(tasks=3))
    trainer.step()
    changed = {n for n, t in model.named_parameters() if not torch.equal(t.detach(), before[n])}
    assert changed == head.keys()


def test_a_non_finite_step_is_refused_and_changes_nothing():
    trainer = Trainer(make_method(CPU), WithNan(CPU, {3}, 2))
    for _ in range(3):
        trainer.step()
    before = state_of(trainer)
    with pytest.raises(NonfiniteError, match=r"meta-step 3: .* NONFINITE: 1 of 6 tasks: 2"):
        trainer.step()
    assert trainer.steps == 3
    assert_unchanged(trainer, before)


def test_a_refusal_explains_each_status_once():
    trainer = Trainer(make_method(CPU), WithNan(CPU, {0}, 2))
    with pytest.raises(NonfiniteError) as caught:
        trainer.step()
    message = str(caught.value)
    assert message.count("NONFINITE: 1 of 6 tasks: 2") == 2  # the inner and the linear solve
    assert message.count("lower the inner learning rate") == 1


def with_unread_records():
    method = make_method(CPU)
    sgd = torch.optim.SGD(method.learned().values(), lr=0.01, fused=True)
    trainer = Trainer(method, sinusoid(CPU), sgd, capture=no_capture)
    return trainer, [trainer.step() for _ in range(3)]


def test_a_trainer_with_unread_records_is_freed_with_its_last_reference():
    trainer, records = with_unread_records()
    freed = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer, records
        assert freed() is None
    finally:
        gc.enable()


def test_a_record_can_be_read_without_another_reference_to_the_trainer():
    _, records = with_unread_records()
    assert [record["step"] for record in records] == [1, 2, 3]


def test_a_failed_task_is_omitted_on_request():
    trainer = Trainer(make_method(CPU, nonfinite="omit"), WithNan(CPU, {1}, 2))
    trainer.step()
    assert trainer.step()["failed"] == 1 / 6
    assert all(t.isfinite().all() for t in state_of(trainer))


def test_a_step_whose_tasks_are_all_omitted_is_not_applied():
    trainer = Trainer(make_method(CPU, nonfinite="omit"), WithNan(CPU, {1}, slice(None)))
    trainer.step()  # after which Adam has momentum
    before = state_of(trainer)
    assert trainer.step()["failed"] == 1
    assert_unchanged(trainer, before)


def test_an_optimizer_that_moved_before_the_refusal_is_restored():
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, 1, 1, dtype=torch.float64)

    class Same:
        def sample(self, step):
            return TaskBatch(zeros, zeros)

    method = FOMAML(lambda params, _: 5 * params["w"].sqrt().sum(), {"w": w})
    method.inner = GradientDescent(steps=0)
    trainer = Trainer(method, Same(), torch.optim.LBFGS([w], lr=10, max_iter=5))
    with pytest.raises(NonfiniteError):  # its first iteration makes w negative
        trainer.step()
    assert w.item() == 1
    assert trainer.steps == 0
    assert not trainer.optimizer.state_dict()["state"]


def test_metrics_receive_the_shared_parameters():
    psi = torch.tensor([2.0], requires_grad=True)
    w = torch.zeros(1, requires_grad=True)

    def loss(params, data):
        x, y = data
        return (params["w"] * x + params["psi"] - y).square().mean()

    method = IMAML(loss, {"w": w}, lam=1.0, shared={"psi": psi})
    source = Sinusoid(tasks=4)
    trainer = Trainer(method, source, metrics={"again": loss})
    record = trainer.step()
    assert record["again"] == pytest.approx(record["loss"])
    with torch.no_grad():
        psi.copy_(torch.tensor([2.0]))
        w.zero_()
    mean = evaluate(method, source, {"loss": loss}, tasks=4).mean["loss"]
    assert mean == pytest.approx(record["loss"])


@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
def test_a_non_finite_gradient_of_a_shared_parameter_changes_nothing(nonfinite):
    psi = torch.zeros(1, requires_grad=True)  # where the square root has no derivative
    w = torch.zeros(1, requires_grad=True)

    def loss(params, data):
        x, y = data
        return (params["w"] * x - y).square().mean() + params["psi"].sqrt().sum()

    method = IMAML(loss, {"w": w}, lam=1.0, shared={"psi": psi}, nonfinite=nonfinite)
    trainer = Trainer(method, Sinusoid(tasks=3))
    if nonfinite == "propagate":
        with pytest.raises(NonfiniteError, match="NONFINITE: 3 of 3 tasks"):
            trainer.step()
    else:
        assert trainer.step()["failed"] == 1
    assert psi.item() == w.item() == 0


def test_a_trainer_whose_records_are_never_read_is_refused():
    with pytest.raises(ValueError, match="read_every must be at least 1, got 0"):
        Trainer(make_method(CPU), sinusoid(CPU), read_every=0)
