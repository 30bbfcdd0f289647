"""Trainings of a process group. As a script, it runs them and saves this rank's results:

torchrun --standalone --nproc-per-node N group_trainings.py FOLDER
"""

import gc
import importlib
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from trainings import make_method, make_trainer, sinusoid, state_of

from imaml_ext import FOMAML, MAML, ProximalStrength, TaskBatch, Trainer, module_loss
from imaml_ext.experiments.models import mlp
from imaml_ext.training.capture import no_capture
from imaml_ext.training.distributed import check_same, process_group, rank
from imaml_ext.training.trainer import NonfiniteError

CPU = torch.device("cpu")
STEPS = 6
TASKS = 7  # not divisible by 2 or 3 processes


class WholeBatches:
    """Sinusoids with NaN targets in some tasks of some steps; not shardable."""

    def __init__(self, steps=(), tasks=()):
        self.finite, self.steps, self.nan_tasks = sinusoid(CPU, TASKS), steps, list(tasks)

    def sample(self, step):
        batch = self.finite.sample(step)
        if step in self.steps:
            batch.support[1][self.nan_tasks] = torch.nan
        return batch


class Weighted(WholeBatches):
    """Tasks with weights; those of weight 0, some of a step's last tasks, are NaN."""

    def __init__(self, *padding):
        super().__init__()
        self.padding = padding

    def sample(self, step):
        batch = self.finite.sample(step)
        weights = 0.1 + torch.arange(TASKS, dtype=torch.float32)
        first = TASKS - self.padding[step % len(self.padding)]
        weights[first:] = 0
        batch.support[1][first:] = torch.nan
        return TaskBatch(batch.support, batch.query, weights)


def learned_strength(group):
    method = make_method(CPU)
    method.lam = ProximalStrength(method.params, 1.0, form="tensor")
    return make_trainer(CPU, source=WholeBatches(), method=method, process_group=group)


def with_lbfgs(group):
    method = make_method(CPU)
    optimizer = torch.optim.LBFGS(method.learned().values(), lr=0.1, max_iter=3)
    return Trainer(method, WholeBatches(), optimizer, process_group=group)


def from_different_starts(group):
    """The ranks start from different parameters, of which rank 0's are used."""
    method = make_method(CPU)
    if group is not None:
        with torch.no_grad():
            for tensor in method.learned().values():
                tensor.add_(rank(group))
    return make_trainer(CPU, source=sinusoid(CPU, TASKS), method=method, process_group=group)


def with_a_frozen_body(group):
    """The ranks have different frozen parameters, of which rank 0's are used."""
    torch.manual_seed(rank(group))
    model = mlp(1, 12, 1).to(torch.float64)
    head = {n: p for n, p in model.named_parameters() if n.startswith("2.")}
    model[0].requires_grad_(False)
    method = FOMAML(module_loss(model, nn.functional.mse_loss), head)
    return make_trainer(CPU, source=sinusoid(CPU, TASKS), method=method, process_group=group)


def omitting(steps, tasks):
    def make(group):
        method = make_method(CPU, nonfinite="omit")
        return make_trainer(
            CPU, source=WholeBatches(steps, tasks), method=method, process_group=group
        )

    return make


TRAININGS = {
    "a shardable source": lambda group: make_trainer(
        CPU, source=sinusoid(CPU, TASKS), process_group=group
    ),
    "a source of whole batches": lambda group: make_trainer(
        CPU, source=WholeBatches(), process_group=group
    ),
    "some tasks fail": omitting([2, 4], [1, 6]),
    "all tasks of a process fail": omitting([2], [0, 1, 2, 3]),
    "all tasks fail": omitting([3], range(TASKS)),
    "weighted tasks": lambda group: make_trainer(
        CPU, source=Weighted(0, 1, 5), process_group=group
    ),
    "weighted tasks, decided on the device": lambda group: make_trainer(
        CPU, no_capture, source=Weighted(0, 1, 5), process_group=group, read_every=4
    ),
    "a learned strength": learned_strength,
    "a learned step size": lambda group: make_trainer(
        CPU,
        source=WholeBatches(),
        method=make_method(CPU, MAML, learn_lr=True),
        process_group=group,
    ),
    "an optimizer with a closure": with_lbfgs,
    "different starts": from_different_starts,
    "a frozen body": with_a_frozen_body,
    "decided on the device": lambda group: make_trainer(
        CPU, no_capture, source=sinusoid(CPU, TASKS), process_group=group, read_every=4
    ),
}


def trained(make, group):
    trainer = make(group)
    for _ in range(STEPS):
        trainer.step()
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history]
    return {"state": state_of(trainer), "records": records}


def refused(group):
    """The step that is refused, the message, and whether the state is unchanged."""
    trainer = make_trainer(CPU, source=WholeBatches([3], [5]), process_group=group)
    for _ in range(3):
        trainer.step()
    before = state_of(trainer)
    try:
        trainer.step()
    except NonfiniteError as error:
        unchanged = all(map(torch.equal, before, state_of(trainer)))
        return {"steps": trainer.steps, "message": str(error), "unchanged": unchanged}
    raise AssertionError("a step with a NaN task was applied")


DOCS = Path(__file__).parents[2] / "docs"
FLAGS = re.MULTILINE | re.DOTALL


def by_hand(group):
    """The parameters after the plain loop of docs/distributed.md, with the model inside DDP."""
    names = {}
    page = (DOCS / "distributed.md").read_text()
    code = re.search(
        r"^import torch\n(?:(?!```).)*?^def train_by_hand.*?(?=^def main)", page, FLAGS
    )
    exec(code[0], names)
    torch.manual_seed(0)
    model = mlp(1, 12, 1).to(torch.float64)
    if group is not None:
        model = nn.parallel.DistributedDataParallel(model).module
        gc.collect()  # the wrapper is in a cycle, and refers to the group, which must end first
    names["train_by_hand"](model, group)
    return [p.detach() for p in model.parameters()]


def mismatch(group):
    """The message about a number that is not the same on all ranks; None if there is none."""
    check_same(7, "the number is", group)
    try:
        check_same(rank(group), "the number is", group)
    except ValueError as error:
        return str(error)
    return None


def main():
    adam = importlib.import_module("torch.optim.adam")
    adam._get_capturable_supported_devices = lambda *_: ["cpu"]
    torch.set_num_threads(1)
    with process_group(CPU) as group:
        results = {name: trained(make, group) for name, make in TRAININGS.items()}
        results["refused"] = refused(group)
        results["mismatch"] = mismatch(group)
        results["by hand"] = by_hand(group) if DOCS.is_dir() else None
    return results


def threads():
    """The names of this process's threads."""
    time.sleep(0.5)  # a thread that has ended may still be listed for a moment
    return [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    results = main()
    results["threads"] = threads()
    torch.save(results, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
