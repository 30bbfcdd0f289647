"""Whatever the library is called with: the exact answer, a report that says why not, or an error.

The oracle is a loop over the tasks, one at a time, with dense matrices in float64.
"""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fuzz import sampled, seeds, tried
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian
from torch.utils import _pytree as pytree

import imaml_ext
from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    MINRES,
    Adam,
    Backtracking,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    ProximalStrength,
    Reptile,
    Status,
    TaskBatch,
    Trainer,
    TruncatedMAML,
    adapt,
    conjugate_gradient,
    implicit_meta_grad,
)
from imaml_ext.flat import Layout
from imaml_ext.trainer import NonfiniteError

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-7}


# ---- problems --------------------------------------------------------------------------------


def convex(params, data):
    """Strongly convex by a little, smooth, and of every parameter, 0-d and empty ones too."""
    at = torch.cat([t.reshape(-1) for t in params.values()])
    (x, y), weight = data["pair"], data["weight"]
    z = (x[:, : at.numel()] * at).sum(1) - y
    return (weight * z.cosh().log()).mean() + 0.1 * (at * at).sum()


def saddle(params, data):
    return convex(params, data) - 20 * sum((t * t).sum() for t in params.values())


@dataclass
class Problem:
    params: dict[str, Tensor]
    support: Any
    query: Any
    lam: Any
    loss: Any = convex

    @property
    def layout(self):
        return Layout(self.params)

    @property
    def tasks(self):
        return self.support["weight"].shape[0]

    @property
    def batch(self):
        return TaskBatch(self.support, self.query)

    def task(self, data, i):
        return pytree.tree_map(lambda t: t[i], data)

    def pick(self, order):
        """The same problem with these tasks."""
        support, query = (
            pytree.tree_map(lambda t: t[order], data) for data in (self.support, self.query)
        )
        return Problem(self.params, support, query, self.lam, self.loss)

    def tensors(self):
        leaves = pytree.tree_leaves((self.params, self.support, self.query, self.lam))
        return [t for t in leaves if isinstance(t, Tensor)]

    def matrix(self):
        """Λ, dense, float64."""
        dim = self.layout.dim
        if isinstance(self.lam, dict):
            parts = [self.lam[n].expand(t.shape).reshape(-1) for n, t in self.params.items()]
            return torch.cat(parts).double().diag()
        if isinstance(self.lam, Tensor) and self.lam.dim() == 2:
            return self.lam.double()
        return float(self.lam) * torch.eye(dim, dtype=torch.float64)

    def exact(self, phi):
        """dL/dtheta and dL/dΛ [D, D] of each task at phi [B, D], in float64."""
        layout = Layout({n: t.double() for n, t in self.params.items()})
        theta, matrix = (
            layout.flatten({n: t.double() for n, t in self.params.items()}),
            self.matrix(),
        )
        data = pytree.tree_map(
            lambda t: t.double() if t.is_floating_point() else t, (self.support, self.query)
        )

        def flat(at, task):
            return self.loss(layout.unflatten(at), task)

        to_theta, to_lam = [], []
        for i, row in enumerate(phi.double()):
            v = grad(flat)(row, self.task(data[1], i))
            a = hessian(flat)(row, self.task(data[0], i)) + matrix
            x = torch.linalg.solve(a, v)
            to_theta.append(matrix @ x)
            outer = torch.outer(x, row - theta)
            to_lam.append(-0.5 * (outer + outer.T))
        return torch.stack(to_theta), torch.stack(to_lam)


SHAPES = [(), (1,), (2,), (3,), (2, 2), (1, 3), (0,), (2, 0), (5,)]


@st.composite
def problems(draw, loss=convex, tasks=None, dtypes=(torch.float32, torch.float64)):
    dtype = draw(sampled(*dtypes))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(seeds))
    strided = draw(st.booleans())

    def normal(*shape):
        if not strided or not shape:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype)[..., 0]

    params = {f"p{k}": normal(*shape) for k, shape in enumerate(shapes)}
    dim = sum(t.numel() for t in params.values())
    count = tasks or draw(st.integers(1, 7))

    def data():
        examples = draw(st.integers(1, 5))
        x = normal(count, examples, dim + 1) / (dim + 1) ** 0.5
        weight = torch.randint(1, 3, (count, examples), generator=generator)
        return {"pair": (x, normal(count, examples)), "weight": weight}

    def positive(*shape):
        return 0.5 + normal(*shape).abs()

    form = draw(sampled("float", "0-d", "dict", "diagonal", "dense"))
    if form == "float":
        lam = draw(st.floats(0.5, 4))
    elif form == "dense":
        factor = normal(dim, dim)
        lam = factor @ factor.T / max(1, dim) + torch.eye(dim, dtype=dtype)
    elif form == "0-d":
        lam = positive()
    else:
        lam = {n: positive(*(t.shape if form == "diagonal" else ())) for n, t in params.items()}
    return Problem(params, data(), data(), lam, loss)


def exact_linear(dim, **settings):
    return ConjugateGradient(max_iter=2 * dim + 5, **settings)


@st.composite
def linear_solvers(draw, dim):
    kind = draw(sampled("cg", "jacobi", "minres", "neumann"))
    if kind == "minres":
        return MINRES(max_iter=2 * dim + 5)
    if kind == "neumann":
        return NeumannSeries(max_iter=1500, lr=0.05, rtol=1e-12)
    return exact_linear(dim, preconditioner="jacobi" if kind == "jacobi" else None)


@st.composite
def inner_solvers(draw):
    steps = draw(sampled(0, 1, 3, 8))
    tol = draw(sampled(None, 0.0, 1e-3))
    kind = draw(sampled("descent", "momentum", "adam", "lbfgs", "free", "external"))
    if kind == "external":
        return External(lambda problem: problem.start() + 0.1, tol=tol)
    return {
        "descent": GradientDescent(lr=0.05, steps=steps, tol=tol),
        "momentum": GradientDescent(lr=0.02, steps=steps, momentum=0.5, nesterov=True, tol=tol),
        "adam": Adam(lr=0.02, steps=steps, tol=tol),
        "lbfgs": LBFGS(steps=steps, tol=tol),
        "free": HessianFree(steps=steps, tol=tol, cg=ConjugateGradient(max_iter=3)),
    }[kind]


def assert_near(got, expected, dtype, factor=1.0):
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def lam_like(problem, mean):
    """The gradient by Λ [D, D], of lam's form."""
    if isinstance(problem.lam, dict):
        parts = Layout(problem.params).unflatten(mean.diagonal().to(problem.layout.dtype))
        return {n: t.sum() if problem.lam[n].dim() == 0 else t for n, t in parts.items()}
    return mean if problem.lam.dim() == 2 else mean.diagonal().sum()


# ---- right answers ---------------------------------------------------------------------------


@given(st.data())
def test_the_meta_gradient_is_that_of_a_dense_solve(data):
    problem = data.draw(problems())
    inner, cg = data.draw(inner_solvers()), data.draw(linear_solvers(problem.layout.dim))
    before = [t.clone() for t in problem.tensors()]
    out = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=problem.lam,
        inner=inner, cg=cg,
    )  # fmt: skip
    tried["implicit_meta_grad"] += 1
    layout = problem.layout
    to_theta, to_lam = problem.exact(layout.flatten(out.adapted))
    assert not out.failed.any(), out.describe()
    assert_near(layout.flatten(out.params), to_theta.mean(0), layout.dtype)
    if isinstance(problem.lam, float):
        assert out.lam is None
    else:
        expected = lam_like(problem, to_lam.mean(0))
        pytree.tree_map(lambda a, b: assert_near(a, b, layout.dtype), out.lam, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors(), strict=True))


@given(st.data())
def test_autograd_through_adapt_is_that_of_a_dense_solve(data):
    problem = data.draw(problems())
    layout, inner = problem.layout, data.draw(inner_solvers())
    leaves = {n: t.clone().requires_grad_() for n, t in problem.params.items()}
    lam = problem.lam
    strengths = [t.requires_grad_() for t in pytree.tree_leaves(lam) if isinstance(t, Tensor)]
    phi = adapt(
        problem.loss, leaves, problem.support, lam=lam, inner=inner,
        cg=data.draw(linear_solvers(layout.dim)),
    )  # fmt: skip
    torch.func.vmap(problem.loss)(phi, problem.query).mean().backward()
    tried["adapt"] += 1
    for t in strengths:
        t.requires_grad_(False)
    to_theta, to_lam = problem.exact(layout.flatten(phi).detach())
    got = layout.flatten({n: t.grad for n, t in leaves.items()})
    assert_near(got, to_theta.mean(0), layout.dtype)
    if strengths:
        expected = pytree.tree_leaves(lam_like(problem, to_lam.mean(0)))
        for t, slope in zip(strengths, expected, strict=True):
            assert_near(t.grad, slope, layout.dtype)


def descended(problem, i, *, steps, lr, momentum, nesterov, lam, data=None):
    """phi of task i after steps of torch.optim.SGD's rule, in the graph of theta: float64."""
    theta = {n: t.detach().double().requires_grad_() for n, t in problem.params.items()}
    phi, velocity = dict(theta), None
    turns = data or [problem.support]
    for step in range(steps):
        task = pytree.tree_map(
            lambda t: t.double() if t.is_floating_point() else t,
            problem.task(turns[step % len(turns)], i),
        )
        loss = problem.loss(phi, task)
        if lam is not None:
            loss = loss + lam / 2 * sum(((phi[n] - theta[n]) ** 2).sum() for n in phi)
        # Through the gradient by phi alone: theta in the proximal term is differentiated by the
        # step that it makes.
        slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        if step == 0 and lam is not None:  # phi is theta itself: the term's own pull is 0
            slopes = torch.autograd.grad(
                problem.loss(phi, task), list(phi.values()), create_graph=True
            )
        if velocity is None:
            velocity = slopes
        else:
            velocity = [momentum * v + g for v, g in zip(velocity, slopes, strict=True)]
        if nesterov:
            slopes = [g + momentum * v for v, g in zip(velocity, slopes, strict=True)]
        elif momentum:
            slopes = velocity
        phi = {n: t - lr * g for (n, t), g in zip(phi.items(), slopes, strict=True)}
    return theta, phi


@given(st.data())
def test_methods_without_a_solve_are_a_loop_over_tasks(data):
    problem = data.draw(problems())
    kind = data.draw(sampled(MAML, FOMAML, Reptile, TruncatedMAML))
    steps, momentum = data.draw(st.integers(0, 4)), data.draw(sampled(0.0, 0.5))
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
        slopes = torch.autograd.grad(problem.loss(phi, task), list(by.values()))
        expected.append(torch.cat([g.reshape(-1) for g in slopes]))
    layout = problem.layout
    assert not out.failed.any()
    assert_near(layout.flatten(out.params), torch.stack(expected).mean(0).detach(), layout.dtype)


# ---- tasks that fail -------------------------------------------------------------------------

METHODS = {
    "IMAML": lambda p, **s: IMAML(p.loss, p.params, lam=p.lam, **s),
    "IMAML, lam learned": lambda p, **s: IMAML(
        p.loss, p.params, lam=ProximalStrength(p.params, form="diagonal"), **s
    ),
    "MAML": lambda p, **s: MAML(p.loss, p.params, learn_lr=True, **s),
    "FOMAML": lambda p, **s: FOMAML(p.loss, p.params, **s),
    "Reptile": lambda p, **s: Reptile(p.loss, p.params, **s),
    "TruncatedMAML": lambda p, **s: TruncatedMAML(p.loss, p.params, last=1, lam=1.0, **s),
}


def poisoned(draw, problem):
    """The problem with tasks whose data is not finite, or explodes; and which."""
    tasks = draw(st.sets(st.integers(0, problem.tasks - 1)))
    support, query = pytree.tree_map(torch.clone, (problem.support, problem.query))
    for i in tasks:
        x, y = draw(sampled(support, query))["pair"]
        value = draw(sampled(torch.nan, torch.inf, -torch.inf))
        leaf = y if draw(st.booleans()) else x[..., -1]  # of x, a column that no one reads
        if leaf is not y and problem.layout.dim:
            leaf = x[..., 0]
        elif leaf is not y:
            leaf = y
        leaf[i, draw(st.integers(0, leaf.shape[1] - 1))] = value
    return Problem(problem.params, support, query, problem.lam, problem.loss), tasks


def named_by(text):
    """Tasks that a report calls NONFINITE."""
    tasks = set()
    for found in re.findall(r"NONFINITE: \d+ of \d+ tasks: ([\d, ]+)", text):
        tasks |= {int(i) for i in found.split(",")}
    return tasks


def state(out, names=("inner", "cg")):
    """What is reported for each task, [B, ...] tensors."""
    found = [out.support_loss, out.query_loss, *out.adapted.values()]
    for name in names:
        solve = getattr(out, name)
        if solve is not None:
            found += [solve.value, solve.status, solve.steps, solve.residual]
    return found


@given(st.data())
def test_a_task_that_is_not_finite_is_named_and_touches_no_other(data):
    problem = data.draw(problems())
    assume(problem.layout.dim > 0)
    bad, tasks = poisoned(data.draw, problem)
    name = data.draw(st.sampled_from(sorted(METHODS)))
    settings = {}
    if name.startswith("IMAML"):
        settings = {"inner": data.draw(inner_solvers()), "cg": ConjugateGradient(max_iter=3)}
    for t in problem.params.values():
        t.requires_grad_()
    good = sorted(set(range(problem.tasks)) - tasks)
    clean = METHODS[name](problem, **settings).meta_gradient(problem.batch)
    assert not clean.failed.any()
    skip = METHODS[name](bad, nonfinite="skip", **settings).meta_gradient(bad.batch)
    refuse = METHODS[name](bad, **settings).meta_gradient(bad.batch)
    tried[f"{name.split(',')[0]}, poisoned"] += 2
    for out in (skip, refuse):
        assert set(out.failed.nonzero().flatten().tolist()) == tasks
        assert named_by(out.describe()) == tasks
        for got, expected in zip(state(out), state(clean), strict=True):
            assert torch.equal(got[good], expected[good])
    for gradient in refuse.named().values():
        assert gradient.isnan().all() if tasks else gradient.isfinite().all()
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
    settings = {"lam": problem.lam, "inner": data.draw(inner_solvers()), "nonfinite": "skip"}
    out, other = (
        implicit_meta_grad(p.loss, p.params, p.support, p.query, **settings)
        for p in (bad, bad.pick(order))
    )
    tried["implicit_meta_grad"] += 2
    for got, expected in zip(state(other), state(out), strict=True):
        torch.testing.assert_close(got, expected[order], equal_nan=True)
    for name, gradient in out.params.items():
        torch.testing.assert_close(other.params[name], gradient, rtol=1e-4, atol=1e-5)


@given(st.data())
def test_an_inner_loop_that_explodes_never_gives_a_gradient_that_is_not_finite(data):
    problem = data.draw(problems(data.draw(sampled(convex, saddle))))
    assume(problem.layout.dim > 0)
    for t in problem.params.values():
        t.requires_grad_()
    lr = 10.0 ** data.draw(st.integers(0, 30))
    inner = GradientDescent(lr=lr, steps=data.draw(st.integers(1, 12)))
    name = data.draw(st.sampled_from(sorted(METHODS)))
    out = METHODS[name](problem, inner=inner, nonfinite="skip").meta_gradient(problem.batch)
    tried[f"{name.split(',')[0]}, exploding"] += 1
    assert all(t.isfinite().all() for t in out.named().values())
    assert named_by(out.describe()) <= set(out.failed.nonzero().flatten().tolist())
    strict = METHODS[name](problem, inner=inner).meta_gradient(problem.batch)
    nan = [bool(t.isnan().all()) for t in strict.named().values() if t.numel()]
    assert nan == [bool(out.failed.any())] * len(nan)


@given(st.data())
def test_negative_curvature_is_reported_and_leaves_x_finite(data):
    problem = data.draw(problems(saddle))
    assume(problem.layout.dim > 0)
    scale = 10.0 ** data.draw(st.integers(-36, 0))
    lam = problem.lam
    shrink = data.draw(st.booleans())
    if shrink:  # Λ^-1 v may overflow
        lam = pytree.tree_map(lambda t: t * scale, lam)
    cg = data.draw(sampled(ConjugateGradient(max_iter=4), NeumannSeries(max_iter=4)))
    out = implicit_meta_grad(
        problem.loss, problem.params, problem.support, problem.query, lam=lam,
        inner=GradientDescent(lr=1e-3, steps=2), cg=cg,
    )  # fmt: skip
    tried["implicit_meta_grad"] += 1
    status = out.cg.status
    ended = (status == Status.NEGATIVE_CURVATURE) | (status == Status.NONFINITE)
    assert ended.all(), out.describe()
    assert out.cg.value.isfinite().all()
    if not shrink:
        assert (status == Status.NEGATIVE_CURVATURE).all()
        assert all(t.isfinite().all() for t in out.params.values())


# ---- training --------------------------------------------------------------------------------


@given(st.data())
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_no_batch_poisons_what_is_trained(data):
    problem = data.draw(problems())
    assume(problem.layout.dim > 0)
    name = data.draw(st.sampled_from(sorted(METHODS)))
    nonfinite = data.draw(sampled("refuse", "skip"))
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
        try:
            trainer.step()
        except NonfiniteError as error:
            assert nonfinite == "refuse"
            assert tasks or exploding
            assert tasks <= named_by(str(error))
            assert trainer.steps == steps
            assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
            if not exploding:
                assert named_by(str(error)) == tasks
        else:
            assert nonfinite == "skip" or not tasks
        tried["Trainer"] += 1
        assert all(t.isfinite().all() for t in method.learned().values())


# ---- what does not fit -----------------------------------------------------------------------


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
    **{str(v): (lambda p, v=v: v) for v in (0.0, -1.0, torch.nan, torch.inf, 1e-330, 10**400)},
    **{str(v): (lambda p, v=v: v) for v in (None, True, "1.0", [1.0], 1j)},
    "0-d nan": lambda p: first(p).new_full((), torch.nan),
    "0-d integer": lambda p: torch.tensor(1),
    "one entry": lambda p: first(p).new_ones(1),
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
    "a vector": lambda params, data: first(params).reshape(-1).expand(3) * 1.0,
    "None": lambda params, data: None,
    "a number": lambda params, data: 1.0,
    "complex": lambda params, data: first(params).sum() * 1j,
}
ADAPTED = {
    "a tensor": lambda p: torch.zeros(p.tasks, p.layout.dim),
    "lists": lambda p: dict.fromkeys(p.params, [0.0]),
    "one task more": lambda p: {n: t.expand(p.tasks + 1, *t.shape) for n, t in p.params.items()},
    "no tasks": lambda p: dict(p.params),
    "half": lambda p: {n: t.half().expand(p.tasks, *t.shape) for n, t in p.params.items()},
    "other names": lambda p: {"x": first(p.params).expand(p.tasks, 1)},
}


def first(params):
    return next(iter(params.values()))


def count(params):
    return sum(t.numel() for t in params.values())


WRONG = {
    "support": TREES, "query": TREES, "params": PARAMS, "lam": LAMS, "loss": LOSSES,
    "adapted": ADAPTED, "nonfinite": {str(v): v for v in ("no", None, True)},
    "inner": {str(v): v for v in ("gd", 3, GradientDescent)},
    "cg": {str(v): v for v in ("cg", 3, ConjugateGradient)},
}  # fmt: skip


def assert_refused(call):
    with pytest.raises((TypeError, ValueError)) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    assert str(refusal.value)


@given(st.data())
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(data):
    problem = data.draw(problems())
    assume(problem.layout.dim > 1)  # or a matrix is a number
    argument = data.draw(st.sampled_from(sorted(WRONG)))
    key = data.draw(st.sampled_from(sorted(WRONG[argument])))
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
    before = [t.clone() for t in problem.tensors()]
    calls = [lambda: implicit_meta_grad(**arguments)]
    if argument not in ("query", "nonfinite", "adapted"):
        del_query = {n: v for n, v in arguments.items() if n != "query"}
        calls.append(lambda: adapt(**del_query))
    for call in calls:
        assert_refused(call)
        tried["implicit_meta_grad" if call is calls[0] else "adapt"] += 1
    assert all(torch.equal(a, b) for a, b in zip(before, problem.tensors(), strict=True))


COUNTS = sampled(-1, 1.5, torch.nan, "3", None, True)
POSITIVE = sampled(0.0, -1.0, torch.nan, torch.inf, "1", None)
NOT_NEGATIVE = sampled(-1.0, torch.nan, "1")
SHARE = sampled(-0.1, 1.0, torch.nan, torch.inf, "1", None)
SETTINGS = [
    (GradientDescent, {"lr": POSITIVE, "steps": COUNTS, "tol": NOT_NEGATIVE, "momentum": SHARE}),
    (Adam, {"lr": POSITIVE, "steps": COUNTS, "tol": NOT_NEGATIVE, "eps": NOT_NEGATIVE,
            "betas": sampled((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, torch.nan), (), (0.5,) * 3)}),
    (LBFGS, {"steps": COUNTS, "tol": NOT_NEGATIVE, "history": st.one_of(COUNTS, st.just(0))}),
    (HessianFree, {"steps": COUNTS, "tol": NOT_NEGATIVE, "damping": NOT_NEGATIVE}),
    (Backtracking, {"trials": st.one_of(COUNTS, st.just(0)), "shrink": SHARE, "sufficient": SHARE}),
    *[(kind, {"max_iter": st.one_of(COUNTS, st.just(0)), "rtol": NOT_NEGATIVE,
              "atol": NOT_NEGATIVE, "damping": sampled(-1.0, torch.nan, torch.inf, "1", None),
              "curvature": sampled("newton", None)} | more)
      for kind, more in ((MINRES, {}), (NeumannSeries, {"lr": POSITIVE}), (ConjugateGradient, {
          "preconditioner": sampled("ilu", 1), "probes": st.one_of(COUNTS, st.just(0))}))],
]  # fmt: skip


@given(st.data())
def test_a_setting_that_cannot_be_is_refused_where_it_is_made(data):
    kind, settings = data.draw(st.sampled_from(SETTINGS))
    name = data.draw(st.sampled_from(sorted(settings)))
    value = data.draw(settings[name])
    assert_refused(lambda: kind(**{name: value}))
    tried[kind.__name__] += 1


# ---- linear solvers --------------------------------------------------------------------------


@st.composite
def systems(draw):
    """Symmetric matrices with eigenvalues in [1, 10], right-hand sides, and Λ in every form."""
    rows, dim = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    dtype = draw(sampled(torch.float32, torch.float64))
    generator = torch.Generator().manual_seed(draw(seeds))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, _ = torch.linalg.qr(normal(rows, dim, dim))
    eigenvalues = 1 + 9 * torch.rand(rows, dim, generator=generator, dtype=torch.float64)
    h = q @ torch.diag_embed(eigenvalues) @ q.mT
    lam = {
        "none": 0.0,
        "float": draw(st.floats(0, 3)),
        "0-d": normal().abs().to(dtype),
        "[1]": normal(1).abs().to(dtype),
        "diagonal": normal(dim).abs().to(dtype),
        "dense": torch.eye(dim, dtype=dtype),
    }[draw(sampled("none", "float", "0-d", "[1]", "diagonal", "dense"))]
    b = normal(rows, dim).to(dtype)
    strided = draw(st.booleans())
    return h, torch.stack([b, b], 2)[..., 0] if strided else b, lam


def dense(h, lam, damping):
    lam = torch.as_tensor(lam, dtype=torch.float64)
    eye = torch.eye(h.shape[-1], dtype=torch.float64)
    return h + (lam if lam.dim() == 2 else lam * eye) + damping * eye


@given(systems(), sampled(0.0, 0.5), st.data())
def test_linear_solvers_solve_their_systems(system, damping, data):
    h, b, lam = system
    dim = b.shape[1]

    def matvec(p):
        return (h.to(b.dtype) @ p[..., None])[..., 0]

    settings = {"max_iter": dim + 3, "damping": damping}
    kind = data.draw(sampled("conjugate_gradient", "MINRES", "NeumannSeries"))
    if kind == "conjugate_gradient":
        start = data.draw(sampled(None, torch.ones_like(b)))
        scales = data.draw(sampled(None, torch.full((dim,), 2.0, dtype=b.dtype)))
        got = conjugate_gradient(matvec, b, lam=lam, x0=start, preconditioner=scales, **settings)
    elif kind == "MINRES":
        got = MINRES(**settings).solve(matvec, b, lam)
    else:
        solver = NeumannSeries(max_iter=600, damping=damping, lr=0.05)
        got = solver.solve(matvec, b, lam)
    tried[kind] += 1
    expected = torch.linalg.solve(dense(h, lam, damping), b.double()[..., None])[..., 0]
    assert_near(got.value, expected, b.dtype)
    assert got.status.dtype == torch.int32
    assert got.status.shape == got.steps.shape == got.residual.shape == (len(b),)
    ended = (got.status == Status.CONVERGED) | (got.status == Status.MAX_ITER)
    assert ended.all()


@given(systems(), st.data())
def test_a_row_that_is_not_finite_ends_alone_and_negative_curvature_too(system, data):
    h, b, lam = system
    assume(b.numel() > 0)
    row = data.draw(st.integers(0, len(b) - 1))
    how = data.draw(sampled("b", "product", "concave", "huge"))
    solver = data.draw(
        sampled(ConjugateGradient(max_iter=4), MINRES(max_iter=4), NeumannSeries(max_iter=4))
    )
    worse, sign = b.clone(), torch.ones(len(b), 1, dtype=b.dtype)
    if how == "b":
        column = data.draw(st.integers(0, b.shape[1] - 1))
        worse[row, column] = data.draw(sampled(torch.nan, torch.inf, -torch.inf))
    sign[row] = {"product": torch.nan, "concave": -30.0, "huge": 1e38}.get(how, 1.0)

    def matvec(p):
        return sign_now * (h.to(b.dtype) @ p[..., None])[..., 0]

    sign_now = torch.ones_like(sign)
    good = solver.solve(matvec, b, lam)
    sign_now = sign
    got = solver.solve(matvec, worse, lam)
    tried[type(solver).__name__] += 2
    others = [i for i in range(len(b)) if i != row]
    for name in ("value", "status", "steps", "residual"):
        assert torch.equal(getattr(got, name)[others], getattr(good, name)[others])
    assert got.value.isfinite().all()
    if how in ("b", "product"):
        assert got.status[row] == Status.NONFINITE
        assert not got.value[row].any()
        assert got.residual[row].isnan()
        assert named_by(got.describe()) == {row}
    elif how == "concave" and not isinstance(solver, MINRES):
        assert got.status[row] == Status.NEGATIVE_CURVATURE


SYSTEMS = {
    "matvec": [lambda p: None, lambda p: p[:1], lambda p: p[:, :1], lambda p: p.half(),
               lambda p: p[0], lambda p: p.to("meta")],
    "b": [torch.ones(4), torch.ones(3, 4).half(), torch.ones(3, 4, dtype=torch.int64), [1.0], None,
          torch.ones(()).expand(2**31, 2**31, 2)],
    "lam": [torch.nan, torch.inf, 1e300, None, "1", torch.ones(2), torch.ones(4).double(),
            torch.ones(4, device="meta"), torch.ones(3, 4)],
    "x0": [torch.ones(4), torch.ones(3, 4).double(), torch.ones(3, 4, device="meta")],
    "preconditioner": [torch.zeros(4), -torch.ones(3, 4), torch.ones(3), torch.ones(4).half(),
                       torch.full((4,), torch.nan), torch.ones(4, device="meta")],
    "damping": [-1.0, torch.nan, torch.inf, 1e300, None],
    "max_iter": [0, -1, 1.5, None],
    "rtol": [-1.0, torch.nan, "1"], "atol": [-1.0, torch.nan],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "which"), [(n, k) for n, values in SYSTEMS.items() for k in range(len(values))]
)
@given(solver=sampled("cg", MINRES, NeumannSeries))
@example("cg")
@example(MINRES)
def test_a_system_that_does_not_fit_is_refused(name, which, solver):
    wrong = {name: SYSTEMS[name][which]}
    arguments = {"matvec": lambda p: 2 * p, "b": torch.ones(3, 4), "max_iter": 2, "lam": 1.0}
    arguments |= wrong
    if solver == "cg":
        assert_refused(lambda: conjugate_gradient(**arguments))
    else:
        assume(name not in ("x0", "preconditioner"))
        settings = {
            n: arguments.pop(n) for n in ("damping", "max_iter", "rtol", "atol") if n in arguments
        }
        assert_refused(lambda: solver(**settings).solve(**arguments))
    tried[solver if solver == "cg" else solver.__name__] += 1


# ---- layout ----------------------------------------------------------------------------------


@given(problems(), st.integers(0, 3))
def test_a_layout_takes_apart_what_it_has_joined(problem, rows):
    layout = problem.layout
    batch = {n: t.expand(rows, *t.shape) for n, t in problem.params.items()}
    for params in (problem.params, batch):
        flat = layout.flatten(params)
        assert flat.shape[-1] == layout.dim
        again = layout.unflatten(flat)
        assert again.keys() == params.keys()
        assert all(torch.equal(again[n], params[n]) for n in params)
    tried["Layout"] += 2


def test_huge_parameters_without_memory_are_only_shapes():
    weight = torch.empty(2**20, 2**20, device="meta")
    support = query = torch.empty(8, 5, 2**20, device="meta")

    def loss(params, x):
        return (x @ params["w"]).square().mean()

    out = implicit_meta_grad(loss, {"w": weight}, support, query, lam=1.0)
    assert out.params["w"].shape == weight.shape
    assert out.cg.status.shape == (8,)
    assert imaml_ext.Status(0) == Status.RUNNING
    tried["implicit_meta_grad"] += 1
