"""Training reaches the optima that it should, whatever the optimizer and the form of lam."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from trainings import on_the_device

from imaml_ext import (
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
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import mlp


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [
        (torch.optim.Adam, 5e-3),
        pytest.param(torch.optim.SGD, 1e-2, marks=pytest.mark.slow),
        pytest.param(torch.optim.RMSprop, 3e-3, marks=pytest.mark.slow),
    ],
)
def test_training_lowers_the_loss_on_unseen_tasks(optimizer, lr, device):
    torch.manual_seed(0)
    model = mlp(1, 20, 1).to(device)
    loss = module_loss(model, nn.functional.mse_loss)
    method = IMAML(
        loss, dict(model.named_parameters()), lam=1.0, inner=GradientDescent(lr=0.005, steps=5),
        linear=ConjugateGradient(max_iter=3, curvature="ggn"),
    )  # fmt: skip
    source, unseen = (Sinusoid(tasks=n, seed=n, device=device) for n in (8, 50))
    trainer = Trainer(method, source, on_the_device(optimizer, method.learned().values(), lr=lr))
    before = evaluate(method, unseen, {"loss": loss}, tasks=50).mean["loss"]
    for _ in range(120):
        trainer.step()
    assert evaluate(method, unseen, {"loss": loss}, tasks=50).mean["loss"] < 0.9 * before


def warns_of_waiting(device):
    """On a GPU an optimizer that needs the host gives a warning."""
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
    """Full Newton steps with a finite-difference Hessian, which calls the closure many times."""

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
        (lambda p: on_the_device(torch.optim.SGD, p, lr=0.3, momentum=0.8), 120),
        (lambda p: on_the_device(torch.optim.SGD, p, lr=1.0), 80),
        pytest.param(
            lambda p: on_the_device(torch.optim.Adam, p, lr=0.05), 220, marks=pytest.mark.slow
        ),
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
    needs_closure = isinstance(trainer.optimizer, (Newton, torch.optim.LBFGS))
    with warns_of_waiting(device) if needs_closure else nullcontext():
        for _ in range(steps):
            trainer.step()
    after = method.meta_gradient(source.batch)

    def norm(out):
        return torch.cat([g.flatten() for g in out.params.values()]).norm()

    assert norm(after) < 1e-4 * norm(before)
    assert after.query_loss.mean() < before.query_loss.mean()
    assert trainer.steps == len(trainer.history) == steps


class Relevance:
    """Regression tasks whose weights vary mainly in the first half of the features.

    theta can learn the common weights, and lam how far the weights of a task are from them.
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


@pytest.mark.slow
def test_a_learned_strength_beats_every_fixed_one_on_held_out_tasks():
    def held_out_loss(form, initial):
        model = nn.Linear(8, 1, bias=False)
        nn.init.zeros_(model.weight)
        params = dict(model.named_parameters())
        lam = ProximalStrength(params, initial, form=form) if form else initial
        loss = module_loss(model, nn.functional.mse_loss)
        newton = HessianFree(steps=1, linear=ConjugateGradient(max_iter=10), damping=0.0)
        method = IMAML(loss, params, lam=lam, inner=newton, linear=ConjugateGradient(max_iter=10))
        optimizer = torch.optim.Adam(method.learned().values(), lr=0.15)
        trainer = Trainer(method, Relevance(50, seed=0), optimizer)
        for _ in range(40):
            trainer.step()
        return evaluate(method, Relevance(1000, seed=1), {"loss": loss}, tasks=1000).mean["loss"]

    fixed = [held_out_loss(None, lam) for lam in torch.logspace(-2, 0, 5).tolist()]
    assert 0 < fixed.index(min(fixed)) < 4  # the best scalar is inside the grid
    assert held_out_loss("diagonal", 1.0) < 0.9 * min(fixed)
    # A learned scalar is as good as the best fixed one.
    assert held_out_loss("scalar", 1.0) < 1.02 * min(fixed)
