"""Conjugate gradient by one call of a program, against the loop over its iterations."""

import pytest
import torch

from imaml_ext import ConjugateGradient, Status
from imaml_ext.programs.task_program import TaskProgram
from imaml_ext.solvers.linear import cg


def diagonal_product(h):
    """Products with diag(h_i), by a program."""
    program = TaskProgram(
        lambda h, p: [h.sum(1), h * p], [h[:1], h[:1]], [False, False], late=1
    )  # fmt: skip
    return program.begin(h)[1]


def systems(dim, dtype):
    """{name: (h, b)} of three tasks each; the last one is ordinary."""
    torch.manual_seed(0)
    h, b = 0.5 + torch.rand(3, dim, dtype=dtype), torch.randn(3, dim, dtype=dtype)

    def changed(which, row, value, column=slice(None)):
        made = h.clone(), b.clone()
        made[which][row, column] = value
        return made

    return {
        "positive": (h, b),
        "negative at once": changed(0, 0, -9.0),
        "negative later": changed(0, 0, -0.9, column=1),
        "b is 0": changed(1, 1, 0.0),
        "b is NaN": changed(1, 0, torch.nan, column=2),
        "h is infinite": changed(0, 0, torch.inf, column=3),
        "H is 0": changed(0, 1, 0.0),
        "badly conditioned": changed(0, 1, 1e9, column=0),
        "b overflows": changed(1, 0, torch.finfo(dtype).max),
    }


SETTINGS = {
    "5 iterations": {"max_iter": 5},
    "1 iteration": {"max_iter": 1},
    "rtol": {"max_iter": 40, "rtol": 1e-3},
    "atol, damping": {"max_iter": 40, "atol": 1e-2, "damping": 0.5},
    "until it is singular": {"max_iter": 60},
}
NAMES = list(systems(4, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dim", "lam"), [(7, 0.3), (7, torch.arange(7.0) / 3), (7, 0.0), (5000, 0.3)]
)
def test_one_call_gives_the_solution_of_the_loop(name, settings, dim, lam, dtype):
    h, b = systems(dim, dtype)[name]
    solver, product = ConjugateGradient(**SETTINGS[settings]), diagonal_product(h)
    lam = lam.to(dtype) if isinstance(lam, torch.Tensor) else torch.tensor([lam], dtype=dtype)
    got = solver.solve(product, b, lam)
    want = solver.solve(lambda p: product(p), b, lam)  # a function has no program
    for attribute in ("value", "status", "steps"):
        assert torch.equal(getattr(got, attribute), getattr(want, attribute)), attribute
    pairs = [(got.residual, want.residual)]
    pairs += [
        (getattr(got.lanczos, part), getattr(want.lanczos, part))
        for part in ("diagonal", "link", "count")
    ]
    for one, other in pairs:  # torch's square roots may be off in the last bit
        torch.testing.assert_close(one, other, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_only_tasks_in_doubt_are_checked_again(name, monkeypatch):
    checked, original = [], cg._checked

    def counted(system, solution, *rest):
        checked.append(solution.status)
        return original(system, solution, *rest)

    monkeypatch.setattr(cg, "_checked", counted)
    h, b = systems(7, torch.float64)[name]
    found = ConjugateGradient(max_iter=5).solve(
        diagonal_product(h), b, torch.tensor([0.3]).double()
    )
    healthy = name in ("positive", "b is 0", "H is 0")
    assert not (checked and healthy)
    assert checked or (found.status != Status.NONFINITE).all()


def test_tensors_are_made_on_the_device_of_the_system_and_share_no_memory():
    h, b = systems(7, torch.float64)["positive"]
    product = diagonal_product(h)
    with torch.device("meta"):
        found = ConjugateGradient(5).solve(product, b, b.new_full((1,), 0.3))
    assert torch.equal(found.value, ConjugateGradient(5).solve(product, b, 0.3).value)
    assert found.value.untyped_storage().nbytes() == b.nbytes
    assert not found.value._is_view()


def test_a_right_hand_side_with_a_negative_bit_is_resolved():
    h, b = systems(7, torch.float64)["positive"]
    got = ConjugateGradient(5).solve(diagonal_product(h), torch._neg_view(b), 0.3)
    assert torch.equal(got.value, -ConjugateGradient(5).solve(diagonal_product(h), b, 0.3).value)
