"""Random arguments give the exact answer, or an error in one line.

The oracle is a loop over the tasks, with dense matrices in float64.
"""

import pytest
import torch
from fuzz import sampled, tried
from fuzz_problems import (
    assert_near,
    assert_rejected,
    inner_solvers,
    lam_like,
    linear_solvers,
    problems,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext import (
    FOMAML,
    LBFGS,
    MAML,
    MINRES,
    Adam,
    Backtracking,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    Reptile,
    TruncatedMAML,
    adapt,
    implicit_meta_grad,
)

pytestmark = pytest.mark.fuzz

# ---- valid arguments ------------------------------------------------------------------------


@given(st.data())
def test_the_meta_gradient_agrees_with_a_dense_solve(data):
    problem = data.draw(problems())
    inner, cg = data.draw(inner_solvers()), data.draw(linear_solvers(problem.layout.dim))
    before, layout = [t.clone() for t in problem.tensors()], problem.layout
    numbers = st.lists(sampled(0.0, 0.5, 1.0, 3.0), min_size=problem.tasks, max_size=problem.tasks)
    weights = data.draw(st.none() | numbers.filter(any).map(torch.tensor))
    start, x0 = torch.randn(2, problem.tasks, layout.dim, dtype=layout.dtype)
    starts = data.draw(st.booleans())
    out = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=problem.lam,
        inner=inner, linear=cg, weights=weights, x0=x0 if starts else None,
        start=layout.unflatten(start) if starts else None,
    )  # fmt: skip
    tried["implicit_meta_grad"] += 1
    to_theta, to_lam = problem.exact(layout.flatten(out.adapted))
    assert not out.failed.any(), out.describe()
    share = torch.ones(problem.tasks) if weights is None else weights
    share = share.double() / share.double().sum()
    assert_near(layout.flatten(out.params), (share[:, None] * to_theta).sum(0), layout.dtype)
    if isinstance(problem.lam, float):
        assert out.lam is None
    else:
        expected = lam_like(problem, (share[:, None, None] * to_lam).sum(0))
        pytree.tree_map(lambda a, b: assert_near(a, b, layout.dtype), out.lam, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors(), strict=True))


@given(st.data())
def test_autograd_through_adapt_agrees_with_a_dense_solve(data):
    problem = data.draw(problems())
    layout, inner = problem.layout, data.draw(inner_solvers())
    leaves = {n: t.clone().requires_grad_() for n, t in problem.params.items()}
    lam = problem.lam
    lam_tensors = [t.requires_grad_() for t in pytree.tree_leaves(lam) if isinstance(t, Tensor)]
    phi = adapt(
        problem.loss, leaves, problem.support, lam=lam, inner=inner,
        linear=data.draw(linear_solvers(layout.dim)), warn=False,
    )  # fmt: skip
    torch.func.vmap(problem.loss)(phi, problem.query).mean().backward()
    tried["adapt"] += 1
    for t in lam_tensors:
        t.requires_grad_(False)
    to_theta, to_lam = problem.exact(layout.flatten(phi).detach())
    got = layout.flatten({n: t.grad for n, t in leaves.items()})
    assert_near(got, to_theta.mean(0), layout.dtype)
    if lam_tensors:
        expected = pytree.tree_leaves(lam_like(problem, to_lam.mean(0)))
        for t, gradient in zip(lam_tensors, expected, strict=True):
            assert_near(t.grad, gradient, layout.dtype)


def descended(problem, i, *, steps, lr, momentum, nesterov, lam, data=None):
    """phi of task i after steps of torch.optim.SGD's rule, in the graph of theta: float64."""
    theta = {n: t.detach().double().requires_grad_() for n, t in problem.params.items()}
    phi, velocity = dict(theta), None
    data_sets = data or [problem.support]
    for step in range(steps):
        task = pytree.tree_map(
            lambda t: t.double() if t.is_floating_point() else t,
            problem.task(data_sets[step % len(data_sets)], i),
        )
        loss = problem.loss(phi, task)
        if lam is not None:
            loss = loss + lam / 2 * sum(((phi[n] - theta[n]) ** 2).sum() for n in phi)
        gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        if step == 0 and lam is not None:  # phi is the tensor theta: the proximal term is constant
            gradients = torch.autograd.grad(
                problem.loss(phi, task), list(phi.values()), create_graph=True
            )
        if velocity is None:
            velocity = gradients
        else:
            velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        if nesterov:
            gradients = [g + momentum * v for v, g in zip(velocity, gradients, strict=True)]
        elif momentum:
            gradients = velocity
        phi = {n: t - lr * g for (n, t), g in zip(phi.items(), gradients, strict=True)}
    return theta, phi


@pytest.mark.parametrize("kind", [MAML, FOMAML, Reptile, TruncatedMAML])
@given(data=st.data())
def test_methods_without_a_linear_solve_agree_with_a_loop_over_tasks(kind, data):
    problem = data.draw(problems())
    steps = data.draw(st.integers(2 if kind is Reptile else 0, 4))
    momentum = data.draw(sampled(0.0, 0.5))
    nesterov = momentum > 0 and data.draw(st.booleans())
    lam = data.draw(sampled(None, 1.5)) if kind is MAML else None
    inner = GradientDescent(lr=0.1, steps=steps, momentum=momentum, nesterov=nesterov)
    settings = {"lam": lam} if kind is MAML else {"last": 0} if kind is TruncatedMAML else {}
    for t in problem.params.values():
        t.requires_grad_()
    out = kind(problem.loss, problem.params, inner=inner, **settings).meta_gradient(problem.batch)
    tried[kind.__name__] += 1
    expected = []
    for i in range(problem.tasks):
        theta, phi = descended(
            problem, i, steps=steps, lr=0.1, momentum=momentum, nesterov=nesterov, lam=lam,
            data=[problem.support, problem.query] if kind is Reptile else None,
        )  # fmt: skip
        if kind is Reptile:
            expected.append(torch.cat([(theta[n] - phi[n]).reshape(-1) for n in theta]))
            continue
        by = phi if kind in (FOMAML, TruncatedMAML) else theta
        task = pytree.tree_map(
            lambda t: t.double() if t.is_floating_point() else t, problem.task(problem.query, i)
        )
        gradients = torch.autograd.grad(problem.loss(phi, task), list(by.values()))
        expected.append(torch.cat([g.reshape(-1) for g in gradients]))
    layout = problem.layout
    assert not out.failed.any()
    assert_near(layout.flatten(out.params), torch.stack(expected).mean(0).detach(), layout.dtype)


# ---- invalid arguments --------------------------------------------------------------------


def half(t):
    return t.half() if t.is_floating_point() else t


def of_other_float(t):
    others = {torch.float32: torch.float64, torch.float64: torch.float32}
    return t.to(others.get(t.dtype, t.dtype))


def leaves(change):
    return lambda p, tree: pytree.tree_map(change, tree)


TREES = {
    "half": leaves(half),
    "another float": leaves(of_other_float),
    "complex": leaves(lambda t: t.to(torch.complex64)),
    "no tasks": leaves(lambda t: t[:0]),
    "no examples": leaves(lambda t: t[:, :0]),
    "0-d": leaves(lambda t: t.flatten()[0]),
    "meta": leaves(lambda t: t.to("meta")),
    "more tasks": leaves(lambda t: torch.cat([t, t])),
    "numbers": leaves(lambda t: 1.0),
    "huge": leaves(lambda t: t.flatten()[0].expand(2**31, 2**31)),
    "leading sizes differ": lambda p, tree: tree | {"weight": tree["weight"][:1].repeat(9, 1)},
    "nothing": lambda p, tree: {},
    "None": lambda p, tree: None,
}
PARAMS = {
    "empty": lambda p: {},
    "all empty": lambda p: {n: t.reshape(-1)[:0] for n, t in p.items()},
    "a list": lambda p: list(p.values()),
    "None": lambda p: None,
    "numbers": lambda p: dict.fromkeys(p, 1.0),
    "half": lambda p: {n: t.half() for n, t in p.items()},
    "integer": lambda p: {n: t.long() for n, t in p.items()},
    "complex": lambda p: {n: t.to(torch.complex64) for n, t in p.items()},
    "mixed": lambda p: p | {"last": torch.zeros(2, dtype=torch.float16)},
    "two devices": lambda p: p | {"last": torch.zeros(2, device="meta")},
}
LAMS = {
    **{str(v): (lambda p, v=v: v) for v in (-1.0, torch.nan, torch.inf)},
    "beyond any float": lambda p: 10**400,
    **{str(v): (lambda p, v=v: v) for v in (None, True, "1.0", [1.0], 1j)},
    "0-d nan": lambda p: first(p).new_full((), torch.nan),
    "0-d integer": lambda p: torch.tensor(1),
    "three dimensions": lambda p: first(p).new_ones(1, 1, 1),
    "huge": lambda p: first(p).new_ones(()).expand(2**31, 2**31),
    "missing": lambda p: dict(list({n: first(p).new_ones(()) for n in p}.items())[1:]),
    "more": lambda p: {n: first(p).new_ones(()) for n in [*p, "x"]},
    "of floats": lambda p: dict.fromkeys(p, 1.0),
    "wrong shape": lambda p: {n: first(p).new_ones(7, 7) for n in p},
    "negative entry": lambda p: {n: -torch.ones_like(t) for n, t in p.items()},
    "on meta": lambda p: first(p).new_ones((), device="meta"),
    "not definite": lambda p: -torch.eye(count(p), dtype=first(p).dtype),
    "not symmetric": lambda p: torch.eye(count(p), dtype=first(p).dtype).index_put(
        (torch.tensor(0), torch.tensor(-1)), first(p).new_tensor(9.0)
    ),
    "dense nan": lambda p: torch.full((count(p), count(p)), torch.nan, dtype=first(p).dtype),
}
LOSSES = {
    "a vector": lambda params, data: first(params).sum().expand(3),
    "None": lambda params, data: None,
    "a number": lambda params, data: 1.0,
    "complex": lambda params, data: first(params).sum() * 1j,
}
ADAPTED = {
    "a tensor": lambda p: torch.zeros(p.tasks, p.layout.dim),
    "lists": lambda p: {n: [0.0] for n in p.params},
    "one task more": lambda p: {n: t.expand(p.tasks + 1, *t.shape) for n, t in p.params.items()},
    "no tasks": lambda p: dict(p.params),
    "half": lambda p: {n: t.half().expand(p.tasks, *t.shape) for n, t in p.params.items()},
    "other names": lambda p: {"x": torch.zeros(p.tasks, 1, dtype=p.layout.dtype)},
}


def first(params):
    return next(iter(params.values()))


def count(params):
    return sum(t.numel() for t in params.values())


WRONG = {
    "support": TREES, "query": TREES, "params": PARAMS, "lam": LAMS, "loss": LOSSES,
    "adapted": ADAPTED, "nonfinite": {str(v): v for v in ("no", None, True)},
    "inner": {str(v): v for v in ("gd", 3, GradientDescent)},
    "linear": {str(v): v for v in ("cg", 3, ConjugateGradient)},
}  # fmt: skip


@pytest.mark.parametrize(("argument", "key"), [(a, key) for a in WRONG for key in WRONG[a]])
@settings(max_examples=max(3, settings().max_examples // 10))
@given(data=st.data())
def test_invalid_arguments_are_rejected_in_one_line_and_nothing_is_written(argument, key, data):
    problem = data.draw(problems())
    assume(problem.layout.dim > 1)  # otherwise some of the wrong lams are valid
    wrong = WRONG[argument][key]
    arguments = {
        "loss": problem.loss, "params": problem.params, "support": problem.support,
        "query": problem.query, "lam": problem.lam,
    }  # fmt: skip
    if argument in ("support", "query"):
        assume(not (key == "leading sizes differ" and problem.tasks == 9))
        wrong = wrong(problem, arguments[argument])
    elif argument in ("params", "lam"):
        wrong = wrong(problem.params)
    elif argument == "adapted":
        wrong = wrong(problem)
    arguments[argument] = wrong
    if (argument, key) == ("params", "half"):  # all, otherwise the error would be about the data
        for name in ("support", "query"):
            arguments[name] = pytree.tree_map(half, arguments[name])
        arguments["lam"] = 1.0
    before = [t.clone() for t in problem.tensors()]
    calls = [lambda: implicit_meta_grad(**arguments)]
    # Too many tasks are an error only together with a query set.
    if argument not in ("query", "nonfinite", "adapted") and key not in ("more tasks", "huge"):
        del_query = {n: v for n, v in arguments.items() if n != "query"}
        calls.append(lambda: adapt(**del_query))
    for call in calls:
        assert_rejected(call)
        tried["implicit_meta_grad" if call is calls[0] else "adapt"] += 1
    assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors(), strict=True))


COUNTS = sampled(-1, 1.5, torch.nan, "3", None, True)
POSITIVE = sampled(0.0, -1.0, torch.nan, torch.inf, "1", None)
NOT_NEGATIVE = sampled(-1.0, torch.nan, "1")
FRACTION = sampled(-0.1, 1.0, torch.nan, torch.inf, "1", None)
SETTINGS = [
    (GradientDescent, {"lr": POSITIVE, "steps": COUNTS, "tol": NOT_NEGATIVE, "momentum": FRACTION}),
    (Adam, {"lr": POSITIVE, "steps": COUNTS, "tol": NOT_NEGATIVE, "eps": NOT_NEGATIVE,
            "betas": sampled((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, torch.nan), (), (0.5,) * 3)}),
    (LBFGS, {"steps": COUNTS, "tol": NOT_NEGATIVE, "history": st.one_of(COUNTS, st.just(0))}),
    (HessianFree, {"steps": COUNTS, "tol": NOT_NEGATIVE, "damping": NOT_NEGATIVE}),
    (Backtracking, {"trials": st.one_of(COUNTS, st.just(0)), "shrink": FRACTION,
                    "sufficient": FRACTION}),
    *[(kind, {"max_iter": st.one_of(COUNTS, st.just(0)), "rtol": NOT_NEGATIVE,
              "atol": NOT_NEGATIVE, "damping": sampled(-1.0, torch.nan, torch.inf, "1", None),
              "curvature": sampled("newton", None)} | more)
      for kind, more in ((MINRES, {}), (NeumannSeries, {"lr": POSITIVE}), (ConjugateGradient, {
          "preconditioner": sampled("ilu", 1), "probes": st.one_of(COUNTS, st.just(0))}))],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
@given(data=st.data())
def test_invalid_settings_are_rejected_by_the_constructor(kind, settings, data):
    name = data.draw(st.sampled_from(sorted(settings)))
    value = data.draw(settings[name])
    assert_rejected(lambda: kind(**{name: value}))
    tried[kind.__name__] += 1


# ---- layout ----------------------------------------------------------------------------------


@given(problems(), st.integers(0, 3))
def test_unflatten_inverts_flatten(problem, rows):
    layout = problem.layout
    batch = {n: t.expand(rows, *t.shape) for n, t in problem.params.items()}
    for params in (problem.params, batch):
        flat = layout.flatten(params)
        assert flat.shape[-1] == layout.dim
        again = layout.unflatten(flat)
        assert again.keys() == params.keys()
        assert all(torch.equal(again[n], params[n]) for n in params)
    tried["Layout"] += 2


def test_a_meta_gradient_on_the_meta_device_allocates_no_memory():
    weight = torch.empty(2**20, 2**20, device="meta")
    support = query = torch.empty(8, 5, 2**20, device="meta")

    def loss(params, x):
        return (x @ params["w"]).square().mean()

    out = implicit_meta_grad(loss, {"w": weight}, support, query, lam=1.0)
    assert out.params["w"].shape == weight.shape
    assert out.linear.status.shape == (8,)
    tried["implicit_meta_grad"] += 1
