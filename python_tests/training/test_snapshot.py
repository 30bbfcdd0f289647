"""Snapshots restore tensors bit for bit, and learning rate schedules."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext.training.snapshot import ScheduleSnapshot, Snapshot


def awkward_tensors(device):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-320], dtype=torch.float64)
    parameter = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    tensors = [
        odd.to(device),
        parameter.detach().to(device).requires_grad_(),
        torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
        torch.randn(4, 6, device=device).T[1:],
        torch.tensor(3.0, device=device),
        torch.zeros(0, 2, device=device),
        torch.tensor(2**62, device=device),
        torch.tensor([True, False], device=device),
    ]
    return tensors


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).numpy().tobytes()


def overwrite(tensors):
    with torch.no_grad():
        for t in tensors:
            t.fill_(torch.nan if t.is_floating_point() else 1)


@pytest.mark.parametrize("unless", [None, False, True])
def test_values_are_restored_bit_for_bit_unless_the_condition_holds(unless, device):
    tensors = awkward_tensors(device)
    before = [bits(t) for t in tensors]
    snapshot = Snapshot(tensors)
    overwrite(tensors)
    after = [bits(t) for t in tensors]
    with torch.no_grad():
        snapshot.restore(unless=None if unless is None else torch.tensor(unless, device=device))
    assert [bits(t) for t in tensors] == (after if unless else before)


def test_a_non_finite_value_does_not_affect_others(device):
    tensor = torch.tensor([1.0, 2.0], device=device)
    snapshot = Snapshot([tensor])
    tensor.copy_(torch.tensor([torch.nan, 3.0]))
    snapshot.restore(unless=torch.tensor(False, device=device))
    assert tensor.tolist() == [1, 2]
    snapshot = Snapshot([tensor.fill_(torch.inf)])
    tensor.copy_(torch.tensor([5.0, 6.0]))
    snapshot.restore(unless=torch.tensor(True, device=device))
    assert tensor.tolist() == [5, 6]


class Operators(TorchDispatchMode):
    """Counts operators that are not views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_the_number_of_operators_does_not_depend_on_the_number_of_tensors():
    counts = []
    for number in (1, 50):
        tensors = [torch.randn(3, 2, dtype=torch.float64) for _ in range(number)]
        tensors += [torch.tensor(1.0) for _ in range(number)]
        with Operators() as operators:
            Snapshot(tensors).restore(unless=torch.tensor(True))
        counts.append(operators.count)
    # For each of two dtypes: joined before and after, selected, written.
    assert counts == [8, 8]


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_schedule_continues_as_if_the_steps_in_between_had_not_been_made(tensor_rate):
    def rates(extra_steps):
        weight = torch.ones(1, requires_grad=True)
        lr = torch.tensor(1.0) if tensor_rate else 1.0
        adam = torch.optim.Adam([weight], lr=lr, capturable=False)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
        found = []
        for step in range(4):
            adam.step()
            snapshot = ScheduleSnapshot(adam, scheduler)
            for _ in range(extra_steps * step):
                scheduler.step()
            snapshot.restore()
            found.append(float(adam.param_groups[0]["lr"]))
            scheduler.step()
        return found

    assert rates(extra_steps=2) == rates(extra_steps=0) == [1, 0.5, 0.25, 0.125]
