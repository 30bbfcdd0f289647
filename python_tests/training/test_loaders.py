"""Training and evaluation on DataLoaders and lists, against loops over the same batches."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from trainings import make_method, state_of

from imaml_ext import FOMAML, GradientDescent, TaskBatch, Trainer, evaluate, module_loss
from imaml_ext.training.capture import no_capture
from imaml_ext.training.distributed import shard
from imaml_ext.training.trainer import NonfiniteError


class Lines(Dataset):
    """Tasks ((x, y), (x, y)): lines of random slopes, in any of three forms."""

    def __init__(self, tasks, form="pairs"):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(tasks, 8, 1, generator=generator, dtype=torch.float64)
        self.y = self.x * torch.randn(tasks, 1, 1, generator=generator, dtype=torch.float64)
        self.form = form

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        x, y = self.x[k], self.y[k]
        parts = (x[:4], y[:4]), (x[4:], y[4:])
        return {
            "pairs": parts,
            "four": parts[0] + parts[1],
            "dicts": dict(zip(("train", "test"), parts, strict=True)),
        }[self.form]


def shuffled(form="pairs", tasks=10):
    generator = torch.Generator().manual_seed(2)
    return DataLoader(Lines(tasks, form), batch_size=4, shuffle=True, generator=generator)


def trained_by_hand(device, steps):
    """SGD along FOMAML's gradient in plain PyTorch, over the epochs of the loader."""
    method = make_method(device, FOMAML)
    theta = {name: p.detach().clone() for name, p in method.params.items()}
    loader, batches = shuffled(), []
    while len(batches) < steps:
        batches += list(loader)
    for (sx, sy), (qx, qy) in batches[:steps]:
        total = {name: torch.zeros_like(t) for name, t in theta.items()}
        for k in range(len(sx)):
            phi = {name: t.clone() for name, t in theta.items()}
            for _ in range(4):
                phi = descended(method, phi, (sx[k], sy[k]), 0.005)
            gradient = torch.func.grad(method.loss)(phi, (qx[k].to(device), qy[k].to(device)))
            total = {name: total[name] + gradient[name] / len(sx) for name in theta}
        theta = {name: theta[name] - 0.01 * total[name] for name in theta}
    return theta


def descended(method, phi, data, lr):
    data = tuple(t.to(next(iter(phi.values())).device) for t in data)
    gradient = torch.func.grad(method.loss)(phi, data)
    return {name: phi[name] - lr * gradient[name] for name in phi}


@pytest.mark.filterwarnings("ignore:each meta-step waits for the device")  # on CUDA
@pytest.mark.parametrize("form", ["pairs", "four", "dicts"])
def test_a_trainer_makes_a_step_for_each_batch_of_a_loader_in_every_epoch(form, device):
    method = make_method(device, FOMAML)
    sgd = torch.optim.SGD(method.learned().values(), lr=0.01)
    trainer = Trainer(method, shuffled(form), sgd)
    for _ in range(7):  # 3 batches an epoch, the last of 2 tasks
        trainer.step()
    for name, want in trained_by_hand(device, 7).items():
        torch.testing.assert_close(method.params[name].detach(), want)


@pytest.mark.filterwarnings("ignore:each meta-step waits for the device")  # on CUDA
def test_a_list_of_batches_resumes_bit_for_bit(device, tmp_path):
    batches = list(DataLoader(Lines(9), batch_size=3))

    def trainer():
        method = make_method(device, FOMAML)
        return Trainer(method, batches, torch.optim.Adam(method.learned().values()))

    whole = trainer()
    for _ in range(5):
        whole.step()
        if whole.steps == 2:
            whole.save(tmp_path / "saved.pt")
    resumed = trainer()
    resumed.load(tmp_path / "saved.pt")
    for _ in range(3):
        resumed.step()
    assert all(map(torch.equal, state_of(resumed), state_of(whole)))


def test_resuming_with_a_loader_warns_that_its_position_is_lost(tmp_path):
    trainer = Trainer(make_method("cpu", FOMAML), shuffled())
    trainer.step()
    trainer.save(tmp_path / "saved.pt")
    with pytest.warns(UserWarning, match="the position of the loader is not restored"):
        trainer.load(tmp_path / "saved.pt")


def test_an_evaluation_passes_over_a_loader_once_and_starts_again_in_the_next(device):
    method = make_method(device, FOMAML)
    lines = Lines(10)
    losses = []
    for k in range(7):
        phi = {name: p.detach().clone() for name, p in method.params.items()}
        (sx, sy), query = lines[k]
        for _ in range(4):
            phi = descended(method, phi, (sx, sy), 0.005)
        losses.append(method.loss(phi, tuple(t.to(device) for t in query)).item())
    loader = DataLoader(lines, batch_size=4)
    for _ in range(2):
        got = evaluate(method, loader, {"loss": method.loss}, tasks=7)
        assert got.mean["loss"] == pytest.approx(sum(losses) / 7)
    trainer = Trainer(method, loader)
    assert trainer.validate(loader, {"l": method.loss}, tasks=7)["l"] == pytest.approx(
        sum(losses) / 7
    )


def test_an_evaluation_on_more_tasks_than_the_loader_has_is_refused():
    method = make_method("cpu", FOMAML)
    for source in (DataLoader(Lines(10), batch_size=4), list(DataLoader(Lines(10), batch_size=4))):
        with pytest.raises(ValueError, match="source has only 10 tasks, got tasks=11"):
            evaluate(method, source, {"loss": method.loss}, tasks=11)


def test_a_loader_of_examples_instead_of_tasks_is_refused():
    x, y = Lines(10).x, Lines(10).y
    trainer = Trainer(make_method("cpu", FOMAML), DataLoader([(x[k], y[k]) for k in range(10)]))
    with pytest.raises(TypeError, match=r"a batch must be .*, got a list of Tensor, Tensor"):
        trainer.step()


class Pairs:
    """A source whose batches are pairs."""

    def __init__(self, device):
        self.batches = [TaskBatch.of(b).to(device) for b in DataLoader(Lines(12), batch_size=4)]

    def sample(self, step):
        batch = self.batches[step % 3]
        return batch.support, batch.query


@pytest.mark.parametrize("capture", [None, no_capture])
def test_a_source_may_sample_pairs(capture, device):
    trainers = []
    for source in (Pairs(device), Pairs(device).batches):
        method = make_method(device, FOMAML)
        sgd = torch.optim.SGD(method.learned().values(), lr=0.01, fused=True)
        trainers.append(Trainer(method, source, sgd, capture=capture))
        for _ in range(5):
            trainers[-1].step()
    got, want = (evaluate(t.method, Pairs(device), {"l": t.method.loss}, tasks=9) for t in trainers)
    assert got.mean == want.mean
    assert all(map(torch.equal, *(state_of(trainer) for trainer in trainers)))


def test_in_a_group_a_list_is_sharded_and_a_loader_refused(monkeypatch):
    monkeypatch.setattr("imaml_ext.training.distributed.dist.get_rank", lambda group: 1)
    group = SimpleNamespace(size=lambda: 2)
    method = make_method("cpu", FOMAML)
    batches = list(DataLoader(Lines(8), batch_size=4))
    source = shard(Trainer(method, batches).source, group)
    assert torch.equal(source.sample(1).support[0], batches[1][0][0][2:])
    with pytest.raises(
        TypeError, match=r"with a process_group, source must have .* sample\(step\)"
    ):
        shard(Trainer(method, shuffled()).source, group)


def exploding(step):
    """Batches of which that of one step has a NaN target in task 2."""
    for number, batch in enumerate(DataLoader(Lines(100), batch_size=4)):
        if number == step:
            batch[0][1][2] = torch.nan
        yield batch


def test_the_task_of_a_refused_step_is_named_while_its_batch_is_the_last():
    trainer = Trainer(make_method("cpu", FOMAML), exploding(1))
    trainer.step()
    for _ in range(2):  # the same batch again, as with any source
        with pytest.raises(NonfiniteError, match=r"meta-step 1: .* NONFINITE: 1 of 4 tasks: 2"):
            trainer.step()


def test_a_refused_step_whose_batch_is_gone_names_no_task():
    method = make_method("cpu", FOMAML)
    sgd = torch.optim.SGD(method.learned().values(), lr=0.01, fused=True)
    trainer = Trainer(method, exploding(2), sgd, capture=no_capture)
    for _ in range(5):
        trainer.step()
    with pytest.raises(NonfiniteError, match=r"meta-step 2: .*Its batch is no longer available"):
        trainer.read()
    assert trainer.steps == 2
    trainer.step()  # on the next batch
    assert trainer.history[-1]["failed"] == 0


def test_a_plain_loop_takes_the_batches_of_a_loader():
    model = nn.Linear(1, 1).double()
    method = FOMAML(
        module_loss(model, nn.functional.mse_loss),
        dict(model.named_parameters()),
        inner=GradientDescent(steps=1),
    )
    for batch in shuffled():
        assert method.meta_gradient(batch).query_loss.shape == (len(batch[0][0]),)
