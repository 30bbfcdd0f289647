"""Random bilevel problems, and their meta-gradients by dense solves in float64, task by task."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fuzz import sampled, seeds
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian
from torch.utils import _pytree as pytree

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    MINRES,
    Adam,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    ProximalStrength,
    Reptile,
    TaskBatch,
    TruncatedMAML,
)
from imaml_ext.problem.layout import Layout

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-7}


def convex(params, data):
    """Smooth, strongly convex with a small modulus, and dependent on every parameter."""
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
        """The problem with the tasks in this order."""
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
def problems(draw, loss=convex):
    dtype = draw(sampled(torch.float32, torch.float64))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(seeds))
    strided = draw(st.booleans())

    def normal(*shape):
        if not strided or not shape:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype)[..., 0]

    params = {f"p{k}": normal(*shape) for k, shape in enumerate(shapes)}
    if not any(t.numel() for t in params.values()):
        params["last"] = normal()
    dim = sum(t.numel() for t in params.values())
    count = draw(st.integers(1, 7))

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
        return NeumannSeries(max_iter=600, lr=0.05, rtol=1e-9)
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
        "free": HessianFree(steps=steps, tol=tol, linear=ConjugateGradient(max_iter=3)),
    }[kind]


def assert_near(got, expected, dtype, factor=1.0):
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def lam_like(problem, mean):
    """The gradient of Λ, [D, D], in lam's form."""
    if isinstance(problem.lam, dict):
        parts = Layout(problem.params).unflatten(mean.diagonal().to(problem.layout.dtype))
        return {n: t.sum() if problem.lam[n].dim() == 0 else t for n, t in parts.items()}
    return mean if problem.lam.dim() == 2 else mean.diagonal().sum()


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


def with_nonfinite_data(draw, problem):
    """The problem with non-finite data in some tasks, and the set of these."""
    tasks = draw(st.sets(st.integers(0, problem.tasks - 1)))
    support, query = pytree.tree_map(torch.clone, (problem.support, problem.query))
    for i in tasks:
        x, y = draw(sampled(support, query))["pair"]
        value = draw(sampled(torch.nan, torch.inf, -torch.inf))
        leaf = y if draw(st.booleans()) else x[..., 0]
        leaf[i, draw(st.integers(0, leaf.shape[1] - 1))] = value
    return Problem(problem.params, support, query, problem.lam, problem.loss), tasks


def reported_tasks(text):
    """Tasks that a report names as NONFINITE."""
    tasks = set()
    for found in re.findall(r"NONFINITE: \d+ of \d+ tasks: ([\d, ]+)", text):
        tasks |= {int(i) for i in found.split(",")}
    return tasks


def state(out, names=("inner", "linear")):
    """The report for each task, [B, ...] tensors."""
    found = [out.support_loss, out.query_loss, *out.adapted.values()]
    for name in names:
        solve = getattr(out, name)
        if solve is not None:
            found += [solve.value, solve.status, solve.steps, solve.residual]
    return found


def assert_rejected(call):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert "\n" not in str(error.value)
    assert str(error.value)
