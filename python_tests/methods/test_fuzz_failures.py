"""Tasks that are not finite, diverge or have negative curvature are reported one by one."""

import pytest
import torch
from fuzz import sampled, tried
from fuzz_problems import (
    METHODS,
    assert_near,
    convex,
    inner_solvers,
    problems,
    reported_tasks,
    saddle,
    state,
    with_nonfinite_data,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from imaml_ext import (
    ConjugateGradient,
    GradientDescent,
    NeumannSeries,
    Status,
    Trainer,
    implicit_meta_grad,
)
from imaml_ext.training.trainer import NonfiniteError

pytestmark = pytest.mark.fuzz


def nonempty_gradients(out, problem):
    """All gradients but those by empty parameters and their lam."""
    empty = [n for n, t in problem.params.items() if not t.numel()]
    named = out.named().items()
    return [t for name, t in named if t.numel() and not name.endswith(tuple(empty) or ("\0",))]


@pytest.mark.parametrize("form", ["0-d", "diagonal", "dense"])
def test_a_task_whose_gradient_overflows_has_failed(form):
    # phi and x are finite, as after an inner loop that diverged; x times phi - theta is not.
    params = {"w": torch.zeros(2)}
    lam = {"0-d": torch.tensor(1.0), "diagonal": {"w": torch.ones(2)}, "dense": torch.eye(2)}[form]
    phi = {"w": torch.tensor([[1.0, 1.0], [1e25, 1e25]])}
    data = phi["w"], torch.tensor([1.0, 1e20])
    out = {
        nonfinite: implicit_meta_grad(
            lambda params, data: data[1] * (params["w"] - data[0]).sum(), params, data, data,
            lam=lam, adapted=phi, nonfinite=nonfinite,
        )
        for nonfinite in ("omit", "propagate")
    }  # fmt: skip
    assert out["omit"].failed.tolist() == [False, True]
    assert reported_tasks(out["omit"].describe()) == {1}
    assert all(t.isfinite().all() for t in pytree.tree_leaves(out["omit"].named()))
    torch.testing.assert_close(out["omit"].params["w"], torch.ones(2))
    assert all(t.isnan().all() for t in pytree.tree_leaves(out["propagate"].named()))


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_a_nonfinite_task_is_reported_and_does_not_change_the_others(name, data):
    problem = data.draw(problems())
    bad, tasks = with_nonfinite_data(data.draw, problem)
    settings = {}
    if name.startswith("IMAML"):
        settings = {"inner": data.draw(inner_solvers()), "linear": ConjugateGradient(max_iter=3)}
    for t in problem.params.values():
        t.requires_grad_()
    good = sorted(set(range(problem.tasks)) - tasks)
    clean = METHODS[name](problem, **settings).meta_gradient(problem.batch)
    assert not clean.failed.any()
    omit = METHODS[name](bad, nonfinite="omit", **settings).meta_gradient(bad.batch)
    propagate = METHODS[name](bad, **settings).meta_gradient(bad.batch)
    tried[f"{name.split(',')[0]}, nonfinite"] += 2
    for out in (omit, propagate):
        assert set(out.failed.nonzero().flatten().tolist()) == tasks
        assert reported_tasks(out.describe()) == tasks
        for got, expected in zip(state(out), state(clean), strict=True):
            assert torch.equal(got[good], expected[good])
    for gradient in nonempty_gradients(propagate, problem):
        assert gradient.isnan().all() if tasks else gradient.isfinite().all()
    lost = ~omit.support_loss.isfinite()
    assert (omit.inner.status[lost] == Status.NONFINITE).all()
    if not good:
        assert not any(t.any() for t in omit.named().values())
        return
    alone = METHODS[name](problem.pick(good), **settings).meta_gradient(problem.pick(good).batch)
    for got, expected in zip(omit.named().values(), alone.named().values(), strict=True):
        assert got.isfinite().all()
        assert_near(got, expected, problem.layout.dtype, 0.01)


@given(st.data())
def test_permuting_the_tasks_permutes_only_the_report(data):
    problem = data.draw(problems())
    order = data.draw(st.permutations(range(problem.tasks)))
    bad, _ = with_nonfinite_data(data.draw, problem)
    settings = {"lam": problem.lam, "inner": data.draw(inner_solvers()), "nonfinite": "omit"}
    out, other = (
        implicit_meta_grad(p.loss, p.params, p.support, p.query, **settings)
        for p in (bad, bad.pick(order))
    )
    tried["implicit_meta_grad"] += 2
    for got, expected in zip(state(other), state(out), strict=True):
        torch.testing.assert_close(got, expected[order], rtol=1e-4, atol=1e-5, equal_nan=True)
    for name, gradient in out.params.items():
        torch.testing.assert_close(other.params[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_a_diverging_inner_loop_never_gives_a_nonfinite_gradient(name, data):
    problem = data.draw(problems(data.draw(sampled(convex, saddle))))
    for t in problem.params.values():
        t.requires_grad_()
    lr = 10.0 ** data.draw(st.integers(0, 30))
    inner = GradientDescent(lr=lr, steps=data.draw(st.integers(2, 12)))
    out = METHODS[name](problem, inner=inner, nonfinite="omit").meta_gradient(problem.batch)
    tried[f"{name.split(',')[0]}, diverging"] += 1
    assert all(t.isfinite().all() for t in out.named().values())
    assert reported_tasks(out.describe()) <= set(out.failed.nonzero().flatten().tolist())
    strict = METHODS[name](problem, inner=inner).meta_gradient(problem.batch)
    nan = [bool(t.isnan().all()) for t in nonempty_gradients(strict, problem)]
    assert nan == [bool(out.failed.any())] * len(nan)


@given(st.data())
def test_negative_curvature_is_reported_and_x_stays_finite(data):
    problem = data.draw(problems(saddle))
    scale = 10.0 ** data.draw(st.integers(-36, 0))
    lam = problem.lam
    shrink = data.draw(st.booleans())
    if shrink:  # Λ^-1 v may overflow
        lam = pytree.tree_map(lambda t: t * scale, lam)
    cg = data.draw(sampled(ConjugateGradient(max_iter=4), NeumannSeries(max_iter=4)))
    out = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam,
        inner=GradientDescent(lr=1e-3, steps=2), linear=cg,
    )  # fmt: skip
    tried["implicit_meta_grad"] += 1
    status = out.linear.status
    ended = (status == Status.NEGATIVE_CURVATURE) | (status == Status.NONFINITE)
    assert ended.all(), out.describe()
    assert out.linear.value.isfinite().all()
    if not shrink:
        assert (status == Status.NEGATIVE_CURVATURE).all()
        assert all(t.isfinite().all() for t in out.params.values())


# ---- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_no_batch_makes_learned_tensors_nonfinite(name, data):
    problem = data.draw(problems())
    nonfinite = data.draw(sampled("propagate", "omit"))
    diverging = data.draw(st.booleans())
    batches = [(problem, set())] + [with_nonfinite_data(data.draw, problem) for _ in range(2)]
    for t in problem.params.values():
        t.requires_grad_()
    lr = 10.0 ** data.draw(st.integers(1, 30)) if diverging else 0.05
    method = METHODS[name](
        problem, inner=GradientDescent(lr=lr, steps=data.draw(st.integers(2, 9))),
        nonfinite=nonfinite,
    )  # fmt: skip

    class Source:
        def sample(self, step):
            return batches[turn][0].batch

    make = data.draw(sampled(torch.optim.SGD, torch.optim.Adam))
    optimizer = make(method.learned().values(), lr=1e-3)
    trainer = Trainer(method, Source(), optimizer)

    def state():
        kept = [s for s in optimizer.state.values()]
        return [t.detach().clone() for t in pytree.tree_leaves((method.learned(), kept))]

    for turn in range(3):
        before, steps = state(), trainer.steps
        tasks = batches[turn][1]
        message = None
        try:
            trainer.step()
        except NonfiniteError as error:
            message = str(error)
        tried["Trainer"] += 1
        if message is None:
            assert nonfinite == "omit" or not tasks
        else:
            assert nonfinite == "propagate"
            reported = reported_tasks(message)
            assert tasks <= reported if diverging else tasks == reported
            assert trainer.steps == steps
            assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        assert all(t.isfinite().all() for t in method.learned().values())
