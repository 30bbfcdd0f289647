"""Methods that unroll the inner solver against finite differences of their unrolled objectives."""

import pytest
import torch
from method_problems import INNER, derivative, query_loss, setting

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    Reptile,
    TruncatedMAML,
)

LAMS = {"plain": None, "proximal": 1.5}
DESCENTS = {
    "plain": {},
    "heavy ball": {"momentum": 0.7},
    "nesterov": {"momentum": 0.7, "nesterov": True},
}


def steps_of(problem, task, phi, theta, *, lr, steps, lam, momentum=0.0, nesterov=False, v=None):
    """phi and velocity after gradient descent on one task's objective, in plain torch."""
    data = tuple(t[task] for t in problem.support)
    for _ in range(steps):
        leaf = phi.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(problem.flat_loss(leaf, data), leaf)
        if lam is not None:
            g = g + lam * (phi - theta)
        v = g if v is None else momentum * v + g
        phi = phi - lr * (g + momentum * v if nesterov else v)
    return phi, v


def assert_is_gradient(got, problem, function, times=4):
    theta = problem.layout.flatten(problem.params)
    flat = problem.layout.flatten(got.params)
    for _ in range(times):
        direction = torch.randn_like(theta)
        want = derivative(function, theta, direction)
        assert ((flat @ direction - want).abs() < 1e-7 * flat.norm() * direction.norm()).all()


@pytest.mark.parametrize("descent", DESCENTS.values(), ids=list(DESCENTS))
@pytest.mark.parametrize("lam", LAMS.values(), ids=list(LAMS))
def test_maml_differentiates_its_unrolled_objective(lam, descent, device):
    problem, params, batch = setting(device)
    inner = GradientDescent(lr=0.05, steps=5, **descent)
    got = MAML(problem.loss, params, inner=inner, lam=lam).meta_gradient(batch)

    def objective(theta):
        adapted = [
            steps_of(problem, i, theta, theta, lr=0.05, steps=5, lam=lam, **descent)[0]
            for i in range(3)
        ]
        return sum(query_loss(problem, i, phi) for i, phi in enumerate(adapted)) / 3

    assert_is_gradient(got, problem, objective)
    theta = problem.layout.flatten(problem.params)
    torch.testing.assert_close(got.query_loss.mean(), objective(theta))
    first = FOMAML(problem.loss, params, inner=inner).meta_gradient(batch)
    a, b = problem.layout.flatten(got.params), problem.layout.flatten(first.params)
    assert (a - b).norm() > 0.01 * a.norm()  # second-order terms matter


def test_accelerated_maml_differentiates_nesterovs_method(device):
    problem, params, batch = setting(device)
    got = MAML(problem.loss, params, inner=INNER, lam=1.5, accelerated=True).meta_gradient(batch)
    root = (0.05 * 1.5) ** 0.5
    descent = {"momentum": (1 - root) / (1 + root), "nesterov": True}

    def objective(theta):
        return (
            sum(
                query_loss(
                    problem,
                    i,
                    steps_of(problem, i, theta, theta, lr=0.05, steps=5, lam=1.5, **descent)[0],
                )
                for i in range(3)
            )
            / 3
        )

    assert_is_gradient(got, problem, objective)


@pytest.mark.parametrize("last", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("lam", LAMS.values(), ids=list(LAMS))
@pytest.mark.parametrize("descent", DESCENTS.values(), ids=list(DESCENTS))
def test_truncated_maml_differentiates_the_last_steps(descent, lam, last, device):
    if last == 0 and lam is not None:
        pytest.skip("rejected")
    problem, params, batch = setting(device)
    inner = GradientDescent(lr=0.05, steps=5, **descent)
    got = TruncatedMAML(problem.loss, params, last=last, inner=inner, lam=lam).meta_gradient(batch)
    last = min(last, 5)
    base = problem.layout.flatten(problem.params)
    before = [
        steps_of(problem, i, base, base, lr=0.05, steps=5 - last, lam=lam, **descent)
        for i in range(3)
    ]

    def objective(theta):
        total = 0.0
        for i, (middle, v) in enumerate(before):
            # The earlier steps give a constant; without lam, their derivative is the identity.
            start = middle + (theta - base) if lam is None or last == 5 else middle
            phi, _ = steps_of(
                problem, i, start, theta, lr=0.05, steps=last, lam=lam, v=v, **descent
            )
            total = total + query_loss(problem, i, phi)
        return total / 3

    assert_is_gradient(got, problem, objective)


def test_truncated_maml_is_maml_with_all_steps_and_first_order_maml_with_none(device):
    problem, params, batch = setting(device)

    def gradient(method):
        return problem.layout.flatten(method.meta_gradient(batch).params)

    maml, first = (kind(problem.loss, params, inner=INNER) for kind in (MAML, FOMAML))
    whole, none = (TruncatedMAML(problem.loss, params, last=k, inner=INNER) for k in (5, 0))
    assert torch.equal(gradient(whole), gradient(maml))
    assert torch.equal(gradient(none), gradient(first))


def test_first_order_maml_is_the_query_gradient_at_phi(device):
    problem, params, batch = setting(device)
    got = FOMAML(problem.loss, params, inner=INNER).meta_gradient(batch)
    theta = problem.layout.flatten(problem.params)
    gradients = []
    for i in range(3):
        phi, _ = steps_of(problem, i, theta, theta, lr=0.05, steps=5, lam=None)
        leaf = phi.clone().requires_grad_()
        gradients.append(torch.autograd.grad(query_loss(problem, i, leaf), leaf)[0])
    torch.testing.assert_close(problem.layout.flatten(got.params), torch.stack(gradients).mean(0))


def test_the_gradient_of_reptile_is_theta_minus_phi(device):
    problem, params, batch = setting(device)
    got = Reptile(problem.loss, params, inner=INNER).meta_gradient(batch)
    theta = problem.layout.flatten(problem.params)
    displacement = []
    for i in range(3):
        support, query = (tuple(t[i] for t in data) for data in (problem.support, problem.query))
        phi = theta.clone().requires_grad_()
        sgd = torch.optim.SGD([phi], lr=0.05)
        for data in (support, query, support, query, support):
            sgd.zero_grad()
            problem.flat_loss(phi, data).backward()
            sgd.step()
        displacement.append(theta - phi.detach())
    torch.testing.assert_close(
        problem.layout.flatten(got.params), torch.stack(displacement).mean(0)
    )


def test_a_learned_step_size_has_the_right_gradient(device):
    problem, params, batch = setting(device)
    method = MAML(problem.loss, params, inner=INNER, learn_lr=True)
    got = method.meta_gradient(batch)
    theta = problem.layout.flatten(problem.params)

    def objective(log_lr):
        return (
            sum(
                query_loss(
                    problem,
                    i,
                    steps_of(problem, i, theta, theta, lr=log_lr.exp(), steps=5, lam=None)[0],
                )
                for i in range(3)
            )
            / 3
        )

    log_lr = torch.tensor(0.05, dtype=torch.float64, device=device).log()
    want = derivative(objective, log_lr, torch.ones_like(log_lr))
    torch.testing.assert_close(got.hyperparameters["log_lr"], want, rtol=1e-7, atol=1e-9)
    assert method.learned().keys() == got.named().keys()
    plain = MAML(problem.loss, params, inner=INNER).meta_gradient(batch)
    for name in params:
        torch.testing.assert_close(got.params[name], plain.params[name])


def test_truncated_back_propagation_at_the_optimum_is_the_neumann_series(device):
    # Shaban et al. 2019, proposition 3.1: K steps at a fixed point give K terms of the series.
    problem, params, batch = setting(device)
    inner = GradientDescent(lr=0.1, steps=600)
    truncated = TruncatedMAML(problem.loss, params, last=7, inner=inner, lam=1.5)
    implicit = IMAML(
        problem.loss, params, inner=inner, lam=1.5, linear=NeumannSeries(max_iter=7, lr=0.1)
    )
    a, b = (problem.layout.flatten(m.meta_gradient(batch).params) for m in (truncated, implicit))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_maml_converged_to_the_optimum_is_implicit_maml(device):
    problem, params, batch = setting(device)
    inner = GradientDescent(lr=0.1, steps=600)
    unrolled = MAML(problem.loss, params, inner=inner, lam=1.5)
    implicit = IMAML(
        problem.loss,
        params,
        inner=inner,
        lam=1.5,
        linear=ConjugateGradient(max_iter=100, rtol=1e-13),
    )
    a, b = (problem.layout.flatten(m.meta_gradient(batch).params) for m in (unrolled, implicit))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


class WithItsOwnSteps(GradientDescent):
    def solve(self, problem):
        return super().solve(problem)


UNROLLED = {
    "maml": MAML,
    "accelerated": lambda *args, **s: MAML(*args, lam=1.5, accelerated=True, **s),
    "truncated": lambda *args, **s: TruncatedMAML(*args, last=1, **s),
    "fomaml": FOMAML,
    "reptile": Reptile,
}
OTHER_SOLVERS = {
    "LBFGS": LBFGS(),
    "HessianFree": HessianFree(),
    "External": External(lambda problem: problem.start()),
    "WithItsOwnSteps": WithItsOwnSteps(),
    "the class GradientDescent": GradientDescent,
    "str": "gd",
}


@pytest.mark.parametrize("name", OTHER_SOLVERS)
@pytest.mark.parametrize("make", UNROLLED.values(), ids=list(UNROLLED))
def test_an_inner_solver_whose_steps_are_not_unrolled_is_refused_at_once(make, name):
    problem, params, _ = setting("cpu")
    with pytest.raises(
        TypeError, match="inner must be an instance of GradientDescent or Adam"
    ) as caught:
        make(problem.loss, params, inner=OTHER_SOLVERS[name])
    assert str(caught.value).endswith(f"got {name}: IMAML takes any inner solver")


def test_a_step_size_that_no_step_uses_is_refused():
    problem, params, _ = setting("cpu")
    with pytest.raises(ValueError, match=r"learn_lr needs .* at least 1 step, got steps=0"):
        MAML(problem.loss, params, inner=GradientDescent(steps=0), learn_lr=True)


@pytest.mark.parametrize("steps", [0, 1])
def test_reptile_without_a_step_on_the_query_set_is_refused(steps):
    problem, params, _ = setting("cpu")
    with pytest.raises(ValueError, match=f"one on the query set, got steps={steps}"):
        Reptile(problem.loss, params, inner=GradientDescent(steps=steps))


def test_reptile_refuses_a_query_loss_which_its_gradient_would_ignore():
    problem, params, _ = setting("cpu")
    with pytest.raises(TypeError, match="query_loss"):
        Reptile(problem.loss, params, query_loss=problem.loss)
