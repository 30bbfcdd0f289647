"""The ridge head against its closed form, differentiated by autograd."""

import pytest
import torch
from torch import nn

from imaml_ext import TaskBatch, module_loss
from imaml_ext.experiments.ridge_head import RidgeHead
from imaml_ext.training import Trainer
from imaml_ext.training.checkpoint import evaluated_tensors

SHOT = 2


def small_model(way=3, running=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=running), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, way)).double()


def small_batch(way, tasks=2, query=3):
    def examples(count):
        x = torch.rand(tasks, way * count, 1, 8, 8, dtype=torch.float64)
        y = torch.arange(way).repeat_interleave(count).expand(tasks, -1)
        return x + y[..., None, None, None] / way, y

    return TaskBatch(examples(SHOT), examples(query))


def precise(method):
    """With solves to rounding error."""
    method.inner = type(method.inner)(
        steps=3, linear=type(method.linear)(max_iter=200, rtol=1e-12), damping=0.0
    )
    method.linear = type(method.linear)(max_iter=200, rtol=1e-12)
    return method


def closed_form(method, x, y, way):
    """Weights [d + 1, way] of one task, the last row being the biases."""
    z = method.body(x) / method.size**0.5
    z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
    gram = z @ z.mT + method.log_ridge.exp() * torch.eye(len(z), dtype=z.dtype)
    return z.mT @ torch.linalg.solve(gram, nn.functional.one_hot(y, way).to(z.dtype))


@pytest.mark.parametrize("way", [3, 5])  # 3 is that of the model
def test_meta_gradient_equals_that_of_the_closed_form(way):
    model, batch = small_model(), small_batch(way)
    method = precise(RidgeHead(module_loss(model, nn.functional.cross_entropy), shot=SHOT))
    losses = []
    for task in range(2):
        weights = closed_form(method, batch.support[0][task], batch.support[1][task], way)
        z = method.body(batch.query[0][task]) / method.size**0.5
        logits = method.log_scale.exp() * (z @ weights[:-1] + weights[-1])
        losses.append(nn.functional.cross_entropy(logits, batch.query[1][task]))
    learned = method.learned()
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(learned.values()))
    out = method.meta_gradient(batch)
    torch.testing.assert_close(out.query_loss, torch.stack(losses).detach())
    named = out.named()
    assert named.keys() == learned.keys()
    for name, gradient in zip(learned, expected, strict=True):
        torch.testing.assert_close(named[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_the_adapted_parameters_are_the_models_with_the_fitted_head():
    model, batch = small_model(), small_batch(3)
    loss = module_loss(model, nn.functional.cross_entropy)
    method = precise(RidgeHead(loss, shot=SHOT))
    phi = method.adapt(batch.support)
    assert phi.keys() == dict(model.named_parameters()).keys()
    assert not any(tensor.requires_grad for tensor in phi.values())
    out = method.meta_gradient(batch)
    for task in range(2):
        row = {name: tensor[task] for name, tensor in phi.items()}
        query = [part[task] for part in batch.query]
        torch.testing.assert_close(loss(row, query).detach(), out.query_loss[task])
        support = [part[task] for part in batch.support]
        torch.testing.assert_close(loss(row, support).detach(), out.support_loss[task])


@pytest.mark.parametrize("part", ["support", "query"])
def test_what_is_not_finite_fails(part):
    method = RidgeHead(module_loss(small_model(), nn.functional.cross_entropy), shot=SHOT)
    batch = small_batch(3)
    assert not method.meta_gradient(batch).failed.any()
    getattr(batch, part)[0][1, 0] = torch.nan
    assert method.meta_gradient(batch).failed.all()  # the gradients are computed together


def test_weights_are_refused():
    method = RidgeHead(module_loss(small_model(), nn.functional.cross_entropy), shot=SHOT)
    batch = small_batch(3)
    with pytest.raises(ValueError, match="does not take weights"):
        method.meta_gradient(TaskBatch(batch.support, batch.query, torch.ones(2)))


def test_the_head_is_not_learned():
    model = small_model()
    method = RidgeHead(module_loss(model, nn.functional.cross_entropy), shot=SHOT)
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "log_ridge", "log_scale"}
    assert method.learned().keys() == names


def test_a_model_without_a_linear_last_layer_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with pytest.raises(TypeError, match=r"last layer must be an nn\.Linear, got ReLU"):
        RidgeHead(module_loss(model, nn.functional.cross_entropy), shot=1)


def with_running_statistics():
    loss = module_loss(small_model(running=True), nn.functional.cross_entropy)
    return loss, RidgeHead(loss, shot=SHOT)


def test_running_statistics_change_in_training_and_normalise_in_evaluation():
    loss, method = with_running_statistics()
    batch = small_batch(3, tasks=1)
    before = {name: tensor.clone() for name, tensor in method.buffers().items()}
    mean = torch.zeros(4, dtype=torch.float64)
    for x in (batch.support[0][0], batch.query[0][0]):  # momentum 0.1
        mean = 0.9 * mean + 0.1 * loss.model[0](x).mean((0, 2, 3)).detach()
    method.meta_gradient(batch)
    torch.testing.assert_close(method.buffers()["1.running_mean"], mean)
    after = {name: tensor.clone() for name, tensor in method.buffers().items()}
    assert after.keys() == before.keys() == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked"
    }  # fmt: skip
    phi = {name: tensor[0] for name, tensor in method.adapt(batch.support).items()}
    x = batch.query[0][0]
    outputs = loss.outputs(phi, x)
    torch.testing.assert_close(loss.outputs(phi, x[:1]), outputs[:1])
    for name, tensor in method.buffers().items():
        assert torch.equal(tensor, after[name])


def test_a_task_that_is_not_finite_does_not_change_running_statistics():
    _, method = with_running_statistics()
    batch = small_batch(3)
    method.meta_gradient(batch)
    before = {name: tensor.clone() for name, tensor in method.buffers().items()}
    batch.query[0][1, 0] = torch.nan
    assert method.meta_gradient(batch).failed.all()
    for name, tensor in method.buffers().items():
        assert torch.equal(tensor, before[name])


def test_a_checkpoint_has_the_running_statistics(tmp_path):
    batches = [small_batch(3, tasks=1) for _ in range(4)]
    _, method = with_running_statistics()
    trainer = Trainer(method, batches)
    for _ in batches:
        trainer.step()
    _, first = with_running_statistics()
    interrupted = Trainer(first, batches)
    interrupted.step()
    interrupted.step()
    interrupted.save(tmp_path / "checkpoint.pt")
    _, second = with_running_statistics()
    resumed = Trainer(second, batches)
    resumed.load(tmp_path / "checkpoint.pt")
    resumed.step()
    resumed.step()
    evaluated = evaluated_tensors(resumed.state_dict())
    for name, tensor in (method.learned() | method.buffers()).items():
        assert torch.equal(evaluated[name], tensor)


def test_a_warm_up_of_a_recording_does_not_change_running_statistics():
    _, method = with_running_statistics()
    changed = []

    def capture(function, warmup):
        before = {name: tensor.clone() for name, tensor in method.buffers().items()}
        warmup()
        changed.extend(n for n, t in method.buffers().items() if not torch.equal(t, before[n]))
        function()
        changed.append("by the step")
        assert not torch.equal(method.buffers()["1.running_mean"], before["1.running_mean"])
        return function

    optimizer = torch.optim.SGD(method.learned().values(), lr=1e-3, fused=True)
    batches = [small_batch(3, tasks=1) for _ in range(2)]
    trainer = Trainer(method, batches, optimizer, capture=capture)
    trainer.step()
    trainer.step()
    assert changed == ["by the step"]
