"""The outer loop: it learns, it resumes bit for bit, it refuses what would poison it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from trainings import on_the_device

from imaml_ext import (
    FOMAML,
    IMAML,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    ProximalStrength,
    TaskBatch,
    Trainer,
    evaluate,
    module_loss,
)
from imaml_ext._io import write_atomically
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import mlp
from imaml_ext.training.checkpoint import load_checkpoint, save_checkpoint, save_model
from imaml_ext.training.trainer import NonfiniteError


def make_method(device="cpu", *, lam=1.0, hidden=20, **settings):
    torch.manual_seed(0)
    model = mlp(1, hidden, 1).to(device)
    loss = module_loss(model, nn.functional.mse_loss)
    return IMAML(
        loss,
        dict(model.named_parameters()),
        lam=lam,
        inner=GradientDescent(lr=0.005, steps=5),
        linear=ConjugateGradient(max_iter=3, curvature="ggn"),
        **settings,
    )


def make_trainer(device="cpu", optimizer=torch.optim.Adam, lr=1e-2, decay=1.0, **settings):
    method = make_method(device, **settings)
    chosen = on_the_device(optimizer, method.learned().values(), lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(chosen, 4, decay)
    return Trainer(method, Sinusoid(tasks=8, device=device), chosen, scheduler=scheduler)


def state_of(trainer):
    return {name: t.detach().clone() for name, t in trainer.method.learned().items()}


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [(torch.optim.SGD, 1e-2), (torch.optim.Adam, 5e-3), (torch.optim.RMSprop, 3e-3)],
)
def test_training_lowers_the_loss_on_unseen_tasks(optimizer, lr, device):
    trainer = make_trainer(device, optimizer, lr)
    unseen = Sinusoid(tasks=50, seed=99, device=device)

    def loss():
        return evaluate(trainer.method, unseen, {"loss": trainer.method.loss}, tasks=50).mean[
            "loss"
        ]

    before = loss()
    for _ in range(120):
        trainer.step()
    assert loss() < 0.9 * before


def warns_of_waiting(device):
    """On a GPU, of an optimizer that needs the host."""
    waits = pytest.warns(UserWarning, match="each meta-step waits for the device")
    return waits if device.type == "cuda" else nullcontext()


class OneBatch:
    """Linear regression on fixed tasks: the meta-objective is a quadratic in theta."""

    def __init__(self, device, dim=4):
        x, y = (torch.randn(6, 9, k, dtype=torch.float64, device=device) for k in (dim, 1))
        self.batch = TaskBatch((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))

    def sample(self, step):
        return self.batch


class Newton(torch.optim.Optimizer):
    """Full Newton steps, the Hessian from differences of the closure's gradient."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure):
        closure()
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.detach().clone() for p in params]

        def gradient():
            return torch.cat([p.grad.flatten() for p in params])

        at_start, columns = gradient(), []
        with torch.no_grad():
            for parameter in params:
                entries = parameter.view(-1)
                for i in range(len(entries)):
                    entries[i] += 1e-4
                    closure()
                    columns.append((gradient() - at_start) / 1e-4)
                    entries[i] -= 1e-4
            move = torch.linalg.solve(torch.stack(columns), at_start)
            sizes = [p.numel() for p in params]
            for parameter, old, part in zip(params, start, move.split(sizes), strict=True):
                parameter.copy_(old - part.view_as(old))


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda p: Newton(p), 2),
        (lambda p: torch.optim.LBFGS(p, max_iter=20, line_search_fn="strong_wolfe"), 3),
        (lambda p: on_the_device(torch.optim.SGD, p, lr=0.3, momentum=0.9), 200),
        (lambda p: on_the_device(torch.optim.SGD, p, lr=0.5), 400),
        (lambda p: on_the_device(torch.optim.Adam, p, lr=0.05), 400),
    ],
    ids=["newton", "lbfgs", "momentum", "sgd", "adam"],
)
def test_any_optimizer_finds_the_same_optimum(make, steps, device):
    source = OneBatch(device)
    model = nn.Linear(4, 1).to(device, torch.float64)
    method = IMAML(
        module_loss(model, nn.functional.mse_loss), dict(model.named_parameters()), lam=1.0,
        inner=HessianFree(steps=1, linear=ConjugateGradient(max_iter=5), damping=0.0),
        linear=ConjugateGradient(max_iter=5),
    )  # fmt: skip
    trainer = Trainer(method, source, make(list(method.learned().values())))
    before = method.meta_gradient(source.batch)
    asks_again = isinstance(trainer.optimizer, (Newton, torch.optim.LBFGS))
    with warns_of_waiting(device) if asks_again else nullcontext():
        for _ in range(steps):
            trainer.step()
    after = method.meta_gradient(source.batch)

    def norm(out):
        return torch.cat([g.flatten() for g in out.params.values()]).norm()

    assert norm(after) < 1e-4 * norm(before)
    assert after.query_loss.mean() < before.query_loss.mean()
    assert trainer.steps == len(trainer.history) == steps


class Relevance:
    """Regression tasks whose weights vary in the first half of the features, and hardly elsewhere.

    What is common is for theta to learn; how far a task may stray from it, for lam.
    """

    def __init__(self, tasks, seed, dim=8, points=6):
        self.tasks, self.seed, self.dim, self.points = tasks, seed, dim, points

    def sample(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step)

        def normal(*shape):
            return torch.randn(self.tasks, *shape, generator=generator)

        spread = torch.where(torch.arange(self.dim) < self.dim // 2, 1.0, 0.05)
        w = 1 + spread[:, None] * normal(self.dim, 1)
        x = normal(2 * self.points, self.dim)
        y = x @ w + 0.3 * normal(2 * self.points, 1)
        n = self.points
        return TaskBatch((x[:, :n], y[:, :n]), (x[:, n:], y[:, n:]))


def test_a_learned_strength_beats_every_fixed_one_on_held_out_tasks():
    def held_out_loss(form, initial):
        model = nn.Linear(8, 1, bias=False)
        nn.init.zeros_(model.weight)
        params = dict(model.named_parameters())
        lam = ProximalStrength(params, initial, form=form) if form else initial
        loss = module_loss(model, nn.functional.mse_loss)
        newton = HessianFree(steps=1, linear=ConjugateGradient(max_iter=10), damping=0.0)
        method = IMAML(loss, params, lam=lam, inner=newton, linear=ConjugateGradient(max_iter=10))
        optimizer = torch.optim.Adam(method.learned().values(), lr=0.05)
        trainer = Trainer(method, Relevance(50, seed=0), optimizer)
        for _ in range(150):
            trainer.step()
        return evaluate(method, Relevance(1000, seed=1), {"loss": loss}, tasks=1000).mean["loss"]

    fixed = [held_out_loss(None, lam) for lam in torch.logspace(-3, 1, 9).tolist()]
    assert 0 < fixed.index(min(fixed)) < 8  # the grid holds the best scalar
    assert held_out_loss("diagonal", 1.0) < 0.9 * min(fixed)
    # A scalar is learned to the best of its kind.
    assert held_out_loss("scalar", 1.0) < 1.02 * min(fixed)


def test_lam_is_learned_when_it_requires_grad(device):
    lam = torch.tensor(1.0, device=device, requires_grad=True)
    trainer = make_trainer(device, lam=lam)
    assert "lam" in trainer.method.learned()
    trainer.step()
    assert lam.grad is not None
    assert lam.item() != 1.0


def test_a_lam_per_parameter_is_learned_too(device):
    start = make_method(device).params
    lam = {name: torch.ones_like(t).requires_grad_() for name, t in start.items()}
    trainer = make_trainer(device, lam=lam)
    trainer.step()
    assert all((tensor != 1).any() for tensor in lam.values())


def test_resuming_is_bit_for_bit(tmp_path):
    whole = make_trainer(lam=torch.tensor(1.0, requires_grad=True), decay=0.5)
    for _ in range(10):
        whole.step()
    half = make_trainer(lam=torch.tensor(1.0, requires_grad=True), decay=0.5)
    for _ in range(5):
        half.step()
    half.save(tmp_path / "c.pt", {"note": "kept"})

    resumed = make_trainer(lam=torch.tensor(3.0, requires_grad=True), decay=0.5)
    resumed.load(tmp_path / "c.pt")
    for _ in range(5):
        resumed.step()

    a, b = state_of(whole), state_of(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[record["loss"] for record in t.history] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert load_checkpoint(tmp_path / "c.pt")["config"] == '{"note": "kept"}'


def test_resuming_is_bit_for_bit_with_dropout(tmp_path):
    def trainer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 9), nn.Dropout(), nn.Linear(9, 1))
        loss = module_loss(model, nn.functional.mse_loss)
        method = IMAML(
            loss, dict(model.named_parameters()), lam=1.0, inner=GradientDescent(0.005, 3)
        )
        return Trainer(method, Sinusoid(tasks=3))

    whole = trainer()
    for _ in range(4):
        whole.step()
    half = trainer()
    half.step()
    half.step()
    half.save(tmp_path / "c.pt")
    resumed = trainer()
    resumed.load(tmp_path / "c.pt")
    resumed.step()
    resumed.step()
    a, b = state_of(whole), state_of(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


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
    trainer = Trainer(IMAML(loss, head, lam=1.0), Sinusoid(tasks=3))
    trainer.step()
    changed = {n for n, t in model.named_parameters() if not torch.equal(t.detach(), before[n])}
    assert changed == head.keys()


class OnePoisonedTask:
    """Deals good batches, but for task 2 of one step."""

    def __init__(self, step):
        self.step = step
        self.good = Sinusoid(tasks=8)

    def sample(self, step):
        batch = self.good.sample(step)
        if step == self.step:
            batch.support[1][2] = torch.nan
        return batch


def test_a_step_that_is_not_finite_is_refused_and_changes_nothing():
    trainer = make_trainer()
    trainer.source = OnePoisonedTask(3)
    for _ in range(3):
        trainer.step()
    before, optimizer = state_of(trainer), trainer.optimizer.state_dict()["state"]
    moments = [s["exp_avg"].clone() for s in optimizer.values()]
    with pytest.raises(NonfiniteError, match=r"meta-step 3: .* NONFINITE: 1 of 8 tasks: 2"):
        trainer.step()
    assert trainer.steps == 3
    after = state_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = [s["exp_avg"] for s in trainer.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))


def test_on_request_the_failing_task_is_skipped():
    trainer = make_trainer(nonfinite="omit")
    trainer.source = OnePoisonedTask(1)
    trainer.step()
    record = trainer.step()
    assert record["failed"] == 1 / 8
    assert all(t.isfinite().all() for t in state_of(trainer).values())


def test_when_every_task_is_skipped_nothing_is_applied():
    trainer = make_trainer(nonfinite="omit")
    trainer.step()  # so that Adam has momentum
    before = state_of(trainer)
    good = trainer.source

    class AllPoisoned:
        def sample(self, step):
            batch = good.sample(step)
            batch.support[1].fill_(torch.nan)
            return batch

    trainer.source = AllPoisoned()
    assert trainer.step()["failed"] == 1
    after = state_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_reports_mean_and_interval(device):
    method = make_method(device)
    source = Sinusoid(tasks=8, device=device)
    got = evaluate(method, source, {"loss": method.loss}, tasks=20)
    values = []
    for step in range(3):
        batch = source.sample(step)
        phi = method.adapt(batch.support)
        values += torch.func.vmap(method.loss)(phi, batch.query).tolist()
    values = torch.tensor(values[:20], dtype=torch.float64)
    assert got.tasks == 20
    assert got.mean["loss"] == pytest.approx(values.mean().item())
    assert got.ci95["loss"] == pytest.approx(1.96 * values.std(correction=0).item() / 20**0.5)


# ---- checkpoints -----------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    make_trainer().save(path)

    def crash(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, crash)
    assert load_checkpoint(path)["steps"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    make_trainer().save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"c.pt is truncated or not a checkpoint$"):
        make_trainer().load(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"text"])
def test_a_foreign_file_is_refused(content, tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c.pt is truncated or not a checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "c.pt"
    torch.save({"format": "imaml_ext checkpoint", "version": 1, "evil": Evil()}, path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    make_trainer(optimizer=torch.optim.SGD).save(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds the state of SGD, but the optimizer is Adam"):
        make_trainer().load(tmp_path / "c.pt")


def test_a_configuration_that_could_not_be_read_back_is_refused_when_saving(tmp_path):
    with pytest.raises(TypeError):
        make_trainer().save(tmp_path / "c.pt", {"out": tmp_path})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_something_missing_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"steps": 1})
    with pytest.raises(ValueError, match="is not a whole checkpoint: it lacks config, learned"):
        load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="it lacks config, history"):
        load_checkpoint(tmp_path / "c.pt", training=True)


def test_another_version_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"format": "imaml_ext checkpoint", "version": 99}, path)
    with pytest.raises(ValueError, match="version 99 checkpoint, expected 1"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(tmp_path):
    make_trainer(hidden=7).save(tmp_path / "c.pt")
    trainer = make_trainer()
    before = state_of(trainer)
    with pytest.raises(ValueError, match="is of another model"):
        trainer.load(tmp_path / "c.pt")
    after = state_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.steps == 0


def test_a_model_alone_is_enough_to_evaluate_and_not_to_resume(tmp_path):
    trainer = make_trainer()
    trainer.step()
    trainer.save(tmp_path / "whole.pt")
    save_model(tmp_path / "model.pt", load_checkpoint(tmp_path / "whole.pt", training=True))
    assert load_checkpoint(tmp_path / "model.pt")["steps"] == 1
    assert (tmp_path / "model.pt").stat().st_size < (tmp_path / "whole.pt").stat().st_size
    with pytest.raises(ValueError, match="is a model alone: it can be evaluated, not trained"):
        make_trainer().load(tmp_path / "model.pt")


def test_a_state_that_could_not_be_loaded_is_refused_when_saving(tmp_path):
    trainer = make_trainer()
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: np.cos(step / 100)
    )
    trainer.step()
    with pytest.raises(TypeError, match=r"c\.pt could not be loaded again: the state holds numpy"):
        trainer.save(tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_in_another_precision_is_refused(tmp_path):
    make_trainer().save(tmp_path / "c.pt")
    trainer = make_trainer()
    for tensor in trainer.method.learned().values():
        tensor.data = tensor.data.double()
    with pytest.raises(ValueError, match=r"\[20, 1\] torch.float32, expected .* torch.float64"):
        trainer.load(tmp_path / "c.pt")


def test_an_optimizer_that_had_moved_before_the_refusal_is_put_back():
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, 1, 1, dtype=torch.float64)

    class Same:
        def sample(self, step):
            return TaskBatch(zeros, zeros)

    method = FOMAML(lambda params, _: 5 * params["w"].sqrt().sum(), {"w": w})
    method.inner = GradientDescent(steps=0)
    trainer = Trainer(method, Same(), torch.optim.LBFGS([w], lr=10, max_iter=5))
    with pytest.raises(NonfiniteError):  # its first step leads to a negative w
        trainer.step()
    assert w.item() == 1
    assert trainer.steps == 0
    assert not trainer.optimizer.state_dict()["state"]


def test_metrics_see_what_tasks_share():
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
def test_a_shared_gradient_that_is_not_finite_changes_nothing(nonfinite):
    psi = torch.zeros(1, requires_grad=True)  # where the root has no derivative
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
