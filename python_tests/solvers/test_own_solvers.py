"""Inner solvers that users write: subclasses of InnerSolver, and functions in External."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from inner_problems import LAMS, setting
from problems import regression

from imaml_ext import (
    IMAML,
    LBFGS,
    MAML,
    Adam,
    ConvergenceWarning,
    External,
    GradientDescent,
    InnerSolver,
    LinearSolver,
    RecordedMetaGradient,
    Solution,
    Status,
    TaskBatch,
    adapt,
    implicit_meta_grad,
)
from imaml_ext.problem.programs import Programs


@dataclass(frozen=True)
class Given(InnerSolver):
    """Returns a solution that was made before; valid, but for `changes`."""

    phi: torch.Tensor
    claimed: Status = Status.RUNNING
    tol: float | None = None
    changes: object = None

    def solve(self, problem):
        if self.changes is not None and not isinstance(self.changes, dict):
            return self.changes
        status = torch.full((problem.tasks,), self.claimed, dtype=torch.int32)
        residual = torch.full(status.shape, torch.nan, dtype=torch.float64)
        solution = Solution(self.phi, status, 0 * status, residual)
        return replace(solution, **(self.changes or {}))


def learned(problem):
    return {name: t.clone().requires_grad_() for name, t in problem.params.items()}


def meta_gradient(problem, **settings):
    arguments = (problem.loss, problem.params, problem.support, problem.query)
    return implicit_meta_grad(*arguments, lam=1.5, **settings)


@pytest.mark.parametrize("claimed", [Status.RUNNING, Status.CONVERGED])
@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.9, Status.CONVERGED), (1.5, None), (3.0, Status.MAX_ITER), (None, None)],
)
def test_the_status_agrees_with_the_measured_residual(claimed, share, expected):
    problem = regression(3)
    phi = meta_gradient(problem, inner=GradientDescent(lr=0.1, steps=20)).adapted
    phi = problem.layout.flatten(phi)
    residual = meta_gradient(problem, inner=Given(phi)).inner.residual
    for task in range(3):
        tol = None if share is None else residual[task].item() / share
        status = meta_gradient(problem, inner=Given(phi, claimed, tol)).inner.status[task]
        undecided = Status.CONVERGED if claimed == Status.CONVERGED else Status.MAX_ITER
        assert status == (undecided if expected is None else expected)


ROWS = torch.zeros(2, 3)
WRONG = {
    "tensor": (ROWS, TypeError, r"the result of Given must be .* Solution, got Tensor"),
    "dict": ({"value": {"w": ROWS}}, TypeError, "Given: value must be an instance of Tensor"),
    "shape": ({"value": ROWS.T}, ValueError, r"Given: value must be \[2, \d+\] torch.float64"),
    "list": ({"status": [1, 1]}, TypeError, "Given: status must be an instance of Tensor"),
    "status dtype": ({"status": ROWS[:, 0]}, ValueError, r"status must be \[2\] torch.int32"),
    "unknown status": (
        {"status": torch.full((2,), 77, dtype=torch.int32)}, ValueError,
        "Given: status must contain values of Status, got 77",
    ),
    "steps": ({"steps": 7}, TypeError, "Given: steps must be an instance of Tensor"),
    "moment": ({"second_moment": ROWS}, ValueError, r"Given: second_moment must be \[2, 25\]"),
    "residual": ({"residual": ROWS[:, 0]}, ValueError, r"residual must be \[2\] torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_result_is_refused(name):
    changes, error, message = WRONG[name]
    problem = regression(2)
    phi = torch.zeros(2, problem.layout.dim, dtype=torch.float64)
    inner = Given(phi, changes=changes)
    with pytest.raises(error, match=message):
        meta_gradient(problem, inner=inner)
    with pytest.raises(error, match=message):
        adapt(problem.loss, learned(problem), problem.support, lam=1.5, inner=inner)
    with pytest.raises(error, match=message):
        IMAML(problem.loss, learned(problem), lam=1.5, inner=inner).adapt(problem.support)


def test_a_solution_may_have_a_graph_and_other_strides():
    problem = regression(4)
    phi = torch.randn(problem.layout.dim, 4, dtype=torch.float64)
    got = meta_gradient(problem, inner=Given(phi.requires_grad_().T))
    want = meta_gradient(problem, inner=Given(phi.detach().T.contiguous()))
    for name in problem.params:
        assert torch.equal(got.params[name], want.params[name])


@pytest.mark.parametrize("name", ["theta", "lam.values"])
def test_constants_of_the_problem_cannot_be_modified(name):
    def move(problem):
        tensor = problem.theta if name == "theta" else problem.lam.values
        tensor.add_(1)
        return problem.start()

    class Moving(InnerSolver):
        def solve(self, problem):
            return Given(move(problem)).solve(problem)

    problem, lam = regression(2), torch.tensor(1.5, dtype=torch.float64)
    call = (problem.loss, problem.params, problem.support, problem.query)
    with pytest.raises(RuntimeError, match=f"Moving modified problem.{name} in place"):
        implicit_meta_grad(*call, lam=lam, inner=Moving())
    lam.fill_(1.5)
    out = implicit_meta_grad(*call, lam=lam, inner=External(move))  # of copies
    assert lam == 1.5
    torch.testing.assert_close(
        out.inner.residual,
        meta_gradient(
            problem, inner=External(lambda problem: problem.start() + (name == "theta"))
        ).inner.residual,
    )


def test_inference_mode_is_refused_as_before():
    problem = regression(2)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="cannot differentiate in inference mode"):
            meta_gradient(problem)
        method = IMAML(problem.loss, learned(problem), lam=1.5, inner=External(lambda p: p.start()))
        assert method.adapt(problem.support)["0.weight"].shape == (2, 6, 2)


def test_a_task_that_the_solver_reports_as_not_finite_has_no_gradient():
    problem = regression(2)
    params = learned(problem)
    inner = Given(torch.zeros(2, problem.layout.dim).double(), Status.NONFINITE)
    phi = adapt(problem.loss, params, problem.support, lam=1.5, inner=inner, warn=False)
    sum(rows.sum() for rows in phi.values()).backward()
    assert all(tensor.grad.isnan().all() for tensor in params.values())


class AutogradDescent(InnerSolver):
    """Takes a step along the gradient of `values`."""

    def solve(self, problem):
        phi = problem.start().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.values(phi).sum(), phi)
        return Given(phi - 0.1 * gradient).solve(problem)


def test_a_subclass_may_use_autograd_in_every_method():
    problem = regression(2)
    want = meta_gradient(problem, inner=GradientDescent(lr=0.1, steps=1)).adapted
    settings = {"lam": 1.5, "inner": AutogradDescent()}
    params = learned(problem)
    found = [
        meta_gradient(problem, inner=AutogradDescent()).adapted,
        adapt(problem.loss, params, problem.support, **settings),
        IMAML(problem.loss, params, **settings).adapt(problem.support),
    ]
    with torch.no_grad():
        found.append(adapt(problem.loss, params, problem.support, **settings))
    for phi in found:
        for name, rows in want.items():
            torch.testing.assert_close(phi[name].detach(), rows)


def test_points_of_another_shape_are_refused():
    _, proximal = setting("cpu")
    for evaluate in (proximal.values, proximal.value_and_gradient):
        for phi in (proximal.theta, proximal.start()[:, 1:], proximal.start()[1:]):
            with pytest.raises(ValueError, match=r"phi must be \[4, 25\], got"):
                evaluate(phi)


def test_a_function_is_referred_to_external():
    with pytest.raises(TypeError, match=r"inner must be .*InnerSolver.*External\(fn\)"):
        meta_gradient(regression(2), inner=lambda problem: problem.start())


class HalfDescent(GradientDescent):
    def direction(self, gradient, state, step):
        direction, state = super().direction(gradient, state, step)
        return 0.5 * direction, state


class HalfAdam(Adam):
    def direction(self, gradient, state, step):
        direction, state = super().direction(gradient, state, step)
        return 0.5 * direction, state


@pytest.mark.parametrize(
    ("half", "whole"),
    [
        (HalfDescent(0.2, 7), GradientDescent(0.1, 7)),
        (HalfDescent(0.2, 7, momentum=0.5, tol=1.0), GradientDescent(0.1, 7, 0.5, tol=1.0)),
        (HalfAdam(0.1, 7), Adam(0.05, 7)),
    ],
)
def test_the_direction_of_a_subclass_is_used_by_every_method(half, whole):
    problem = regression(4)
    got, want = (meta_gradient(problem, inner=inner) for inner in (half, whole))
    assert torch.equal(got.inner.steps, want.inner.steps)
    for name in problem.params:
        torch.testing.assert_close(got.adapted[name], want.adapted[name])
    if half.tol is None:
        for inner in (half, whole):
            method = MAML(problem.loss, learned(problem), lam=1.5, inner=inner)
            phi = method.adapt(problem.support)
            for name in problem.params:
                torch.testing.assert_close(phi[name], want.adapted[name])


class Lion(Adam):
    """The sign of a mean; its state is one tensor, not Adam's two."""

    def direction(self, gradient, state, step):
        mean = 0.9 * state[0] + 0.1 * gradient if state else gradient
        return mean.sign(), (mean,)


def test_a_subclass_of_adam_may_keep_another_state():
    problem = regression(3)
    out = meta_gradient(problem, inner=Lion(lr=0.01, steps=4))
    assert out.inner.second_moment is None
    largest = 0.04 + 1e-12
    for name, rows in out.adapted.items():
        assert 0 < (rows - problem.params[name]).abs().max() <= largest


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("form", LAMS)
def test_values_are_differentiable_twice(form, recorded, device):
    with Programs().use() if recorded else nullcontext():
        _, proximal = setting(device, form=form)
    phi = torch.randn_like(proximal.start()).requires_grad_()
    value, gradient = proximal.value_and_gradient(phi)
    values = proximal.values(phi)
    torch.testing.assert_close(values, value)
    (own,) = torch.autograd.grad(values.sum(), phi)
    torch.testing.assert_close(own, gradient)
    vector = torch.randn_like(phi)
    _, product = torch.autograd.functional.hvp(lambda q: proximal.values(q).sum(), phi, vector)
    curvature = proximal.objective.linearise(phi.detach(), "hessian").matvec(vector)
    torch.testing.assert_close(product, curvature + proximal.lam.mv(vector))
    assert not gradient.requires_grad


def test_values_are_refused_inside_a_transform():
    _, proximal = setting("cpu")
    with pytest.raises(RuntimeError, match="inside vmap, grad"):
        torch.func.grad(lambda q: proximal.values(q).sum())(proximal.start())


def torch_adam(problem):
    phi = problem.start().requires_grad_()
    optimizer = torch.optim.Adam([phi], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        problem.values(phi).sum().backward()
        optimizer.step()
    return phi


def test_torch_optim_differentiates_values(device):
    problem = regression(4, device)
    batch = TaskBatch(problem.support, problem.query)
    inner, want = External(torch_adam), meta_gradient(problem, inner=Adam(0.1, 5))
    method = IMAML(problem.loss, learned(problem), lam=1.5, inner=inner)
    recorded = RecordedMetaGradient(method.meta_gradient, batch)
    for got in (meta_gradient(problem, inner=inner), *(recorded(batch) for _ in range(3))):
        for name in problem.params:
            torch.testing.assert_close(got.params[name], want.params[name])


def test_phi_of_any_strides_is_evaluated():
    _, proximal = setting("cpu")
    phi = torch.randn(proximal.start().T.shape, dtype=torch.float64).T
    assert not phi.is_contiguous()
    torch.testing.assert_close(proximal.values(phi), proximal.values(phi.contiguous()))
    got, want = (proximal.value_and_gradient(each) for each in (phi, phi.contiguous()))
    torch.testing.assert_close(got, want)


def test_negative_curvature_without_ritz_values_is_not_blamed_on_max_iter():
    class Direct(LinearSolver):
        def _solve(self, system):
            steps = torch.zeros(len(system.b), dtype=torch.int32)
            status = torch.full_like(steps, Status.NEGATIVE_CURVATURE)
            return Solution(0.1 * system.b, status, steps, system.b.norm(dim=1))

    problem = regression(2)
    params = {name: t.requires_grad_() for name, t in problem.params.items()}
    phi = adapt(
        problem.loss, params, problem.support, lam=1.5, inner=LBFGS(steps=20), linear=Direct()
    )
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        sum(t.square().sum() for t in phi.values()).backward()
