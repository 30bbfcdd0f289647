"""Tasks that are not finite, explode or meet negative curvature are named, and poison nothing."""

import pytest
import torch
from fuzz import sampled, tried
from fuzz_problems import (
    METHODS,
    assert_near,
    convex,
    inner_solvers,
    named_by,
    poisoned,
    problems,
    saddle,
    state,
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


def seen(out, problem):
    """The gradients that there are: not by what is empty, nor by the strength of it."""
    empty = [n for n, t in problem.params.items() if not t.numel()]
    named = out.named().items()
    return [t for name, t in named if t.numel() and not name.endswith(tuple(empty) or ("\0",))]


@pytest.mark.parametrize("form", ["0-d", "diagonal", "dense"])
def test_a_product_that_overflows_is_a_task_that_failed(form):
    # phi and x are finite, as after an inner loop that exploded; x times phi - theta is not.
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
    assert named_by(out["omit"].describe()) == {1}
    assert all(t.isfinite().all() for t in pytree.tree_leaves(out["omit"].named()))
    torch.testing.assert_close(out["omit"].params["w"], torch.ones(2))
    assert all(t.isnan().all() for t in pytree.tree_leaves(out["propagate"].named()))


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_a_task_that_is_not_finite_is_named_and_touches_no_other(name, data):
    problem = data.draw(problems())
    bad, tasks = poisoned(data.draw, problem)
    settings = {}
    if name.startswith("IMAML"):
        settings = {"inner": data.draw(inner_solvers()), "linear": ConjugateGradient(max_iter=3)}
    for t in problem.params.values():
        t.requires_grad_()
    good = sorted(set(range(problem.tasks)) - tasks)
    clean = METHODS[name](problem, **settings).meta_gradient(problem.batch)
    assert not clean.failed.any()
    skip = METHODS[name](bad, nonfinite="omit", **settings).meta_gradient(bad.batch)
    refuse = METHODS[name](bad, **settings).meta_gradient(bad.batch)
    tried[f"{name.split(',')[0]}, poisoned"] += 2
    for out in (skip, refuse):
        assert set(out.failed.nonzero().flatten().tolist()) == tasks
        assert named_by(out.describe()) == tasks
        for got, expected in zip(state(out), state(clean), strict=True):
            assert torch.equal(got[good], expected[good])
    for gradient in seen(refuse, problem):
        assert gradient.isnan().all() if tasks else gradient.isfinite().all()
    lost = ~skip.support_loss.isfinite()
    assert (skip.inner.status[lost] == Status.NONFINITE).all()
    if not good:
        assert not any(t.any() for t in skip.named().values())
        return
    alone = METHODS[name](problem.pick(good), **settings).meta_gradient(problem.pick(good).batch)
    for got, expected in zip(skip.named().values(), alone.named().values(), strict=True):
        assert got.isfinite().all()
        assert_near(got, expected, problem.layout.dtype, 0.01)


@given(st.data())
def test_the_order_of_tasks_is_that_of_the_report_and_of_nothing_else(data):
    problem = data.draw(problems())
    order = data.draw(st.permutations(range(problem.tasks)))
    bad, _ = poisoned(data.draw, problem)
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
def test_an_inner_loop_that_explodes_never_gives_a_gradient_that_is_not_finite(name, data):
    problem = data.draw(problems(data.draw(sampled(convex, saddle))))
    for t in problem.params.values():
        t.requires_grad_()
    lr = 10.0 ** data.draw(st.integers(0, 30))
    inner = GradientDescent(lr=lr, steps=data.draw(st.integers(1, 12)))
    out = METHODS[name](problem, inner=inner, nonfinite="omit").meta_gradient(problem.batch)
    tried[f"{name.split(',')[0]}, exploding"] += 1
    assert all(t.isfinite().all() for t in out.named().values())
    assert named_by(out.describe()) <= set(out.failed.nonzero().flatten().tolist())
    strict = METHODS[name](problem, inner=inner).meta_gradient(problem.batch)
    nan = [bool(t.isnan().all()) for t in seen(strict, problem)]
    assert nan == [bool(out.failed.any())] * len(nan)


@given(st.data())
def test_negative_curvature_is_reported_and_leaves_x_finite(data):
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
def test_no_batch_poisons_what_is_trained(name, data):
    problem = data.draw(problems())
    nonfinite = data.draw(sampled("propagate", "omit"))
    exploding = data.draw(st.booleans())
    batches = [(problem, set())] + [poisoned(data.draw, problem) for _ in range(2)]
    for t in problem.params.values():
        t.requires_grad_()
    lr = 10.0 ** data.draw(st.integers(1, 30)) if exploding else 0.05
    method = METHODS[name](
        problem, inner=GradientDescent(lr=lr, steps=data.draw(st.integers(1, 9))),
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
        refusal = None
        try:
            trainer.step()
        except NonfiniteError as error:
            refusal = str(error)
        tried["Trainer"] += 1
        if refusal is None:
            assert nonfinite == "omit" or not tasks
        else:
            assert nonfinite == "propagate"
            assert tasks <= named_by(refusal) if exploding else tasks == named_by(refusal)
            assert trainer.steps == steps
            assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        assert all(t.isfinite().all() for t in method.learned().values())
