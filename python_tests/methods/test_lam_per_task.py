"""A proximal strength per task: each task is solved with its own, and gets its own gradient.

The oracles are loops over single tasks, and finite differences of the bilevel objective, whose
inner problems are solved by Newton's method in plain PyTorch.
"""

import pytest
import torch
from method_problems import derivative

from imaml_ext import (
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
    Status,
    TaskBatch,
    adapt,
    conjugate_gradient,
    evaluate,
    implicit_meta_grad,
)
from imaml_ext._tracing import recording
from imaml_ext.problem.programs import Programs

B, D = 3, 4
CG = ConjugateGradient(max_iter=30, rtol=1e-14)
EXACT = {"inner": HessianFree(steps=12, linear=CG, damping=0.0, tol=1e-11), "linear": CG}


def loss(params, data):
    """log cosh of the residuals: convex, and not quadratic."""
    x, y = data
    return (x @ params["w"] + params["b"] - y).cosh().log().mean()


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def problem():
    params = {"w": randn(D - 1), "b": randn()}
    support, query = ((randn(B, 6, D - 1), randn(B, 6)) for _ in range(2))
    return params, support, query


def positive(*shape):
    return 0.3 + torch.rand(shape, dtype=torch.float64)


FORMS = {
    "[B]": lambda: positive(B),
    "[B, D]": lambda: positive(B, D),
    "dict": lambda: {"b": positive(B), "w": positive(B, D - 1)},
    "dict, in part of one number": lambda: {"w": positive(B, D - 1), "b": positive()},
    "dict, in part for all tasks": lambda: {"w": positive(D - 1), "b": positive(B)},
}


@pytest.fixture(params=list(FORMS))
def lam(request):
    return FORMS[request.param]()


def own(lam, task):
    """Λ of one task as a diagonal for single tasks."""
    if isinstance(lam, dict):
        w = lam["w"][task] if lam["w"].dim() == 2 else lam["w"]
        b = lam["b"][task] if lam["b"].dim() == 1 else lam["b"]
        return {"w": w, "b": b}
    row = lam[task].expand(D)
    return {"w": row[: D - 1], "b": row[D - 1]}


def tensors(lam):
    return list(lam.values()) if isinstance(lam, dict) else [lam]


def one(data, task):
    return tuple(leaf[task : task + 1] for leaf in data)


def gathered(lam, parts):
    """The gradient in lam's form, from those of the tasks' diagonals, each already weighted."""
    w, b = (torch.stack([part[name] for part in parts]) for name in ("w", "b"))
    if isinstance(lam, dict):
        return {
            name: rows if lam[name].dim() == rows.dim() else rows.sum(0)
            for name, rows in {"b": b, "w": w}.items()
        }
    rows = torch.cat([w, b[:, None]], 1)
    return rows if lam.dim() == 2 else rows.sum(1)


def assert_like_a_loop(problem, lam, **settings):
    params, support, query = problem
    got = implicit_meta_grad(loss, params, support, query, lam=lam, **settings)
    alone = [
        implicit_meta_grad(
            loss, params, one(support, i), one(query, i), lam=own(lam, i), **settings
        )
        for i in range(B)
    ]
    for name in params:
        want = torch.stack([out.params[name] for out in alone]).mean(0)
        torch.testing.assert_close(got.params[name], want)
    want = gathered(lam, [{n: t / B for n, t in out.lam.items()} for out in alone])
    torch.testing.assert_close(got.lam, want)
    for report in ("inner", "linear"):
        mine = getattr(got, report)
        each = [getattr(out, report) for out in alone]
        assert mine.status.tolist() == [solve.status.item() for solve in each]
        torch.testing.assert_close(mine.value, torch.cat([solve.value for solve in each]))
    return got


def by_descent(problem):
    """Gradient descent on one task at a time."""
    rows = []
    for task in problem.one_by_one():
        phi = task.start()
        for _ in range(20):
            phi = phi - 0.3 * task.value_and_gradient(phi)[1]
        rows.append(phi)
    return torch.cat(rows)


SOLVERS = {
    "gradient descent": {"inner": GradientDescent(lr=0.2, steps=6, momentum=0.5)},
    "gradient descent to a tolerance": {"inner": GradientDescent(lr=0.3, steps=80, tol=1e-4)},
    "Adam": {"inner": Adam(lr=0.1, steps=6)},
    "Adam's moments": {
        "inner": Adam(lr=0.1, steps=6), "linear": ConjugateGradient(4, preconditioner="adam"),
    },
    "Hessian-free": EXACT,
    "L-BFGS": {"inner": LBFGS(steps=6)},
    "external": {"inner": External(by_descent)},
    "a few CG steps": {"linear": ConjugateGradient(max_iter=2, damping=0.1)},
    "Jacobi": {"linear": ConjugateGradient(max_iter=2, preconditioner="jacobi")},
    "MINRES": {"linear": MINRES(max_iter=10)},
    "Neumann": {"linear": NeumannSeries(max_iter=20, lr=0.4)},
}  # fmt: skip


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("form", ["[B]", "[B, D]"])
def test_every_solver_solves_each_task_with_its_own_lam(problem, form, solver):
    assert_like_a_loop(problem, FORMS[form](), **SOLVERS[solver])


def test_every_form_equals_a_loop_over_the_tasks(problem, lam):
    assert_like_a_loop(problem, lam, **EXACT)


def outer(problem, lam):
    """The mean query loss at the optima, by Newton's method with derivatives by hand.

    Its first steps use an upper bound of the curvature, with which every step decreases G.
    """
    params, (x, y), query = problem
    theta = torch.cat([params["w"], params["b"][None]])
    rows = [own(lam, task) for task in range(B)]
    diagonal = torch.stack([torch.cat([row["w"], row["b"][None]]) for row in rows])
    x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
    phi = theta.expand(B, D)
    for step in range(40):
        slope = (torch.einsum("bnd,bd->bn", x, phi) - y).tanh()
        gradient = torch.einsum("bnd,bn->bd", x, slope) / 6 + diagonal * (phi - theta)
        second = torch.ones_like(slope) if step < 30 else 1 - slope**2
        curvature = torch.einsum("bnd,bn,bne->bde", x, second, x) / 6
        phi = phi - torch.linalg.solve(curvature + torch.diag_embed(diagonal), gradient)
    assert gradient.norm() < 1e-12
    x, y = query
    return (torch.einsum("bnd,bd->bn", x, phi[:, :-1]) + phi[:, -1:] - y).cosh().log().mean()


def test_the_gradient_is_that_of_the_bilevel_objective(problem, lam):
    params, support, query = problem
    got = implicit_meta_grad(loss, params, support, query, lam=lam, **EXACT)
    lams, gradients = lam, got.lam
    if isinstance(lam, torch.Tensor):
        lams, gradients = {"": lam}, {"": got.lam}
    for name, at in lams.items():
        assert gradients[name].shape == at.shape

        def along(value, name=name):
            return outer(problem, {**lam, name: value} if name else value)

        direction = torch.randn_like(at)
        want = derivative(along, at, direction)
        total = (gradients[name] * direction).sum()
        torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-9)
    direction = {name: torch.randn_like(t) for name, t in params.items()}

    def moved(h):
        at = {name: t + h * direction[name] for name, t in params.items()}
        return outer((at, support, query), lam)

    want = derivative(moved, torch.zeros((), dtype=torch.float64), 1.0)
    total = sum((got.params[name] * direction[name]).sum() for name in params)
    torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-9)


def test_adapt_differentiates_a_network_that_computes_lam_for_each_task(problem):
    params, support, query = problem
    features, weight = randn(B, 2), randn(2, D).requires_grad_()

    def strengths(weight):
        return (features @ weight).exp()

    phi = adapt(loss, params, support, lam=strengths(weight), **EXACT)
    torch.func.vmap(loss)(phi, query).mean().backward()
    direction = torch.randn_like(weight)
    want = derivative(lambda w: outer(problem, strengths(w)), weight.detach(), direction)
    torch.testing.assert_close((weight.grad * direction).sum(), want, rtol=1e-6, atol=1e-9)


def test_adapt_has_the_gradients_of_implicit_meta_grad(problem, lam):
    params, support, query = problem
    want = implicit_meta_grad(loss, params, support, query, lam=lam, **EXACT)
    for tensor in tensors(lam):
        tensor.requires_grad_()
    phi = adapt(loss, params, support, lam=lam, **EXACT)
    torch.func.vmap(loss)(phi, query).mean().backward()
    got = {n: t.grad for n, t in lam.items()} if isinstance(lam, dict) else lam.grad
    torch.testing.assert_close(got, want.lam)


LINEAR = {
    "CG": ConjugateGradient(max_iter=30, rtol=1e-13),
    "CG with damping": ConjugateGradient(max_iter=30, rtol=1e-13, damping=0.4),
    "MINRES": MINRES(max_iter=30, rtol=1e-13),
    "Neumann": NeumannSeries(max_iter=400, lr=0.3, rtol=1e-12),
}


@pytest.mark.parametrize("solver", list(LINEAR))
@pytest.mark.parametrize("shape", [(5, 1), (5, 6), (5, 1, 6), (6, 1), (6, 1, 6), (1, 1), (1, 6)])
def test_linear_systems_have_their_own_lam(shape, solver):
    linear, rows = LINEAR[solver], shape[0]
    root, b = randn(rows, 6, 6), randn(rows, 6)
    h, lam = root @ root.mT / 6, positive(*shape)
    got = linear.solve(lambda p: torch.einsum("bij,bj->bi", h, p), b, lam)
    diagonal = (lam[:, 0] if lam.dim() == 3 else lam).expand(rows, 6) + linear.damping
    want = torch.linalg.solve(h + torch.diag_embed(diagonal), b)
    torch.testing.assert_close(got.value, want, rtol=1e-8, atol=1e-10)
    assert (got.status == Status.CONVERGED).all()


def test_conjugate_gradient_starts_anywhere_with_a_lam_per_row():
    h, b, lam, x0 = torch.eye(6).double(), randn(5, 6), positive(5, 6), randn(5, 6)
    got = conjugate_gradient(lambda p: p @ h, b, lam=lam, max_iter=20, rtol=1e-13, x0=x0)
    torch.testing.assert_close(got.value, b / (1 + lam))


def test_a_square_lam_per_row_is_refused_with_a_remedy():
    b = randn(6, 6)
    with pytest.raises(ValueError, match=r"must be symmetric: .* pass it as \[6, 1, 6\]"):
        conjugate_gradient(lambda p: p, b, lam=positive(6, 6), max_iter=1)


@pytest.mark.parametrize(
    "lam", [torch.tensor([0.5, 9.0, 2.0]), positive(3, 2)], ids=["[B]", "[B, D]"]
)
def test_negative_curvature_in_the_first_iteration_gives_first_order_gradients(lam):
    curvature = torch.tensor([1.0, -20.0, 1.0], dtype=torch.float64)
    lam = lam.double()
    params = {"w": randn(2)}

    def quadratic(params, data):
        return (0.5 * data * params["w"] @ params["w"]).sum()

    got = implicit_meta_grad(
        quadratic, params, curvature[:, None], torch.ones(3, 1).double(), lam=lam,
        inner=GradientDescent(lr=0.01, steps=1), linear=ConjugateGradient(max_iter=5),
    )  # fmt: skip
    assert got.linear.status.tolist()[1] == Status.NEGATIVE_CURVATURE
    phi = got.adapted["w"]
    torch.testing.assert_close(phi, (1 - 0.01 * curvature[:, None]) * params["w"])
    diagonal = lam.reshape(3, -1)
    x = phi / (curvature[:, None] + diagonal)  # the gradient of the query loss is phi
    each = diagonal * x
    each[1] = phi[1]
    torch.testing.assert_close(got.params["w"], each.mean(0))
    gradient = -x * (phi - params["w"]) / 3
    gradient[1] = 0.0
    want = gradient.sum(1) if lam.dim() == 1 else gradient
    torch.testing.assert_close(got.lam, want)


def test_a_failed_task_is_omitted_and_has_no_gradient(problem):
    params, support, query = problem
    lam = positive(B, D)
    support[1][1] = torch.nan
    got = implicit_meta_grad(loss, params, support, query, lam=lam, nonfinite="omit", **EXACT)
    keep = [0, 2]
    want = implicit_meta_grad(
        loss, params, *(tuple(leaf[keep] for leaf in data) for data in (support, query)),
        lam=lam[keep], **EXACT,
    )  # fmt: skip
    torch.testing.assert_close(got.params, want.params)
    torch.testing.assert_close(got.lam[keep], want.lam)
    assert (got.lam[1] == 0).all()
    assert got.failed.tolist() == [False, True, False]


def test_where_values_cannot_be_read_only_the_task_with_an_invalid_lam_fails(problem):
    lam = torch.tensor([0.5, 0.0, 0.7], dtype=torch.float64)
    with recording():
        got = implicit_meta_grad(loss, *problem, lam=lam)
    assert got.failed.tolist() == [False, True, False]


@pytest.mark.parametrize("method", [IMAML, MAML])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_where_values_cannot_be_read_an_invalid_lam_is_omitted(problem, method, value):
    params, support, query = problem
    lam = torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)
    settings = {"inner": GradientDescent(lr=0.1, steps=3), "nonfinite": "omit"}
    made = method(loss, {k: t.requires_grad_() for k, t in params.items()}, lam=lam, **settings)
    given = [tuple(leaf[[0, 2]] for leaf in data) for data in (support, query)]
    rest = method(loss, made.params, lam=lam[[0, 2]], **settings)
    want = rest.meta_gradient(TaskBatch(*given)).params
    lam[1] = value
    with recording():
        got = made.meta_gradient(TaskBatch(support, query))
    assert got.failed.tolist() == [False, True, False]
    torch.testing.assert_close(got.params, want)


def test_programs_have_the_same_gradients(problem):
    def bounded(params, data):
        x, y = data
        return ((x @ params["w"] + params["b"]).tanh() - y).square().mean()

    lam, programs = 3 * positive(B, D), Programs()
    want = implicit_meta_grad(bounded, *problem, lam=lam)
    with programs.use():
        got = implicit_meta_grad(bounded, *problem, lam=lam)
    programs.check()
    torch.testing.assert_close(got.params, want.params)
    torch.testing.assert_close(got.lam, want.lam)


@pytest.mark.parametrize("method", [IMAML, MAML])
def test_a_method_takes_batches_of_as_many_tasks_only(problem, method):
    params, support, query = problem
    params = {name: t.requires_grad_() for name, t in params.items()}
    made = method(loss, params, lam=positive(B), inner=GradientDescent(lr=0.1, steps=3))
    assert made.meta_gradient(TaskBatch(support, query)).params["w"].isfinite().all()
    fewer = TaskBatch(support, query).rows(range(2))
    with pytest.raises(ValueError, match="lam has values for 3 tasks, but the batch has 2"):
        made.meta_gradient(fewer)
    with pytest.raises(ValueError, match="lam has values for 3 tasks, but the batch has 2"):
        evaluate(made, [fewer], {"loss": loss}, tasks=2)


def test_a_lam_per_task_is_learned_by_imaml(problem):
    params, support, query = problem
    params = {name: t.requires_grad_() for name, t in params.items()}
    lam = positive(B).requires_grad_()
    method = IMAML(loss, params, lam=lam, **EXACT)
    got = method.meta_gradient(TaskBatch(support, query)).named()["lam"]
    plain = {name: t.detach() for name, t in params.items()}
    torch.testing.assert_close(
        got, implicit_meta_grad(loss, plain, support, query, lam=lam.detach(), **EXACT).lam
    )


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


REFUSED = {
    "B = D is dense": (ones(D, D), r"a dense lam must be .*pass a dict of tensors \[B, \*shap"),
    "0 for one task": (torch.tensor([0.5, 0.0, 1.0]).double(), "positive and finite in every"),
    "0 for the only task": (torch.zeros(1).double(), "positive and finite in every"),
    "another width": (ones(B, D - 1), r"must be 0-d, dense \[4, 4\], or \[B\] or \[B, 4\]"),
    "other tasks": (ones(B + 1), "lam has values for 4 tasks, but the batch has 3"),
    "one task": (ones(1, D), "lam has values for 1 tasks, but the batch has 3"),
    "two numbers of tasks": (
        {"w": ones(B, D - 1), "b": ones(2)}, r"same number of tasks, got \{'w': 3, 'b'",
    ),
    "another shape": (
        {"w": ones(B, D), "b": ones()}, r"must be 0-d or of shape \[3\], or that",
    ),
    "dtype": (ones(B).float(), "lam is torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_lam_per_task_is_refused_in_one_line(problem, case):
    lam, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        implicit_meta_grad(loss, *problem, lam=lam)
    assert "\n" not in str(caught.value)
