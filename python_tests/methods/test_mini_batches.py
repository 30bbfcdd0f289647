"""Inner solvers on another mini-batch in each step."""

import pytest
import torch
from problems import regression
from ridge_problems import LAM, assert_same_gradients, data, fit, learned, randn, ridge
from torch.func import vmap

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    Adam,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    MiniBatches,
    Reptile,
    StepSize,
    TaskBatch,
    TruncatedMAML,
    adapt,
    evaluate,
    implicit_meta_grad,
)

CG = ConjugateGradient(max_iter=60, rtol=1e-12)


def torch_steps(optimizer, params, batches, theta, lam):
    """Steps of a torch.optim optimizer for one task, on each of its mini-batches in turn."""
    theta = theta.detach()
    w = theta.clone().requires_grad_()
    stepper = optimizer([w], **params)
    for x, y in batches:
        stepper.zero_grad()
        loss = (x @ w - y).square().mean() + 0.5 * lam * (w - theta).square().sum()
        loss.backward()
        stepper.step()
    return w.detach()


@pytest.mark.parametrize("form", ["tensors", "function"])
@pytest.mark.parametrize(
    ("inner", "optimizer", "settings"),
    [
        (GradientDescent(lr=0.05, steps=7), torch.optim.SGD, {"lr": 0.05}),
        (
            GradientDescent(lr=0.05, steps=7, momentum=0.9, nesterov=True),
            torch.optim.SGD,
            {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        ),
        (Adam(lr=0.05, steps=7), torch.optim.Adam, {"lr": 0.05}),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_step_k_uses_mini_batch_k_of_every_task(inner, optimizer, settings, form):
    x, y, theta = randn(3, 5, 6, 4), randn(3, 5, 6), randn(4)  # 5 mini-batches of 6 examples
    batches = (x, y) if form == "tensors" else lambda k: (x[:, k % 5], y[:, k % 5])
    support = MiniBatches(data(), batches)
    out = implicit_meta_grad(fit, {"w": theta}, support, data(), lam=LAM, inner=inner, linear=CG)
    for task in range(3):
        turns = [(x[task, k % 5], y[task, k % 5]) for k in range(7)]
        want = torch_steps(optimizer, settings, turns, theta, LAM)
        torch.testing.assert_close(out.adapted["w"][task], want)


def test_everything_but_the_steps_uses_the_data():
    support, query, theta = data(), data(), {"w": randn(4)}
    other = MiniBatches(support, (randn(3, 2, 6, 4), randn(3, 2, 6)))
    inner = GradientDescent(lr=0.05, steps=5)
    out = implicit_meta_grad(fit, theta, other, query, lam=LAM, inner=inner, linear=CG)
    at = implicit_meta_grad(fit, theta, support, query, lam=LAM, adapted=out.adapted, linear=CG)
    assert torch.equal(out.params["w"], at.params["w"])
    assert torch.equal(out.inner.residual, at.inner.residual)
    assert torch.equal(out.support_loss, at.support_loss)


def test_drawn_mini_batches_converge_to_the_minimum_for_all_examples():
    # Each stage divides the step size by 4, and starts where the last one ended.
    support, query, theta = data(), data(), learned()
    want = torch.stack([ridge(x, y, theta["w"]) for x, y in zip(*support, strict=True)]).detach()
    start, errors = None, []
    for stage in range(5):
        inner = GradientDescent(lr=0.2 / 4**stage, steps=30 * 2**stage)
        drawn = MiniBatches.draw(support, batch_size=3, steps=inner.steps, seed=stage)
        out = implicit_meta_grad(
            fit, theta, drawn, query, lam=LAM, inner=inner, linear=CG, start=start
        )
        start = out.adapted
        errors.append((out.adapted["w"] - want).norm().item())
    assert errors[-1] < 1e-2 * want.norm()
    assert errors[-1] < errors[0] / 10
    exact = implicit_meta_grad(fit, theta, support, query, lam=LAM, adapted={"w": want}, linear=CG)
    torch.testing.assert_close(out.params["w"], exact.params["w"], rtol=2e-2, atol=2e-2)


def test_adapt_differentiates_the_minimum_for_the_data():
    theta, (x, y), (qx, qy) = learned(), data(), data()
    x.requires_grad_()
    support = MiniBatches((x, y), lambda step: (x.detach(), y))  # the steps reach the minimum
    inner = GradientDescent(lr=0.1, steps=400, momentum=0.8)
    phi = adapt(fit, theta, support, lam=LAM, inner=inner, linear=CG)
    value = vmap(fit)(phi, (qx, qy)).mean()
    exact = sum(
        (c @ ridge(a, b, theta["w"]) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, qx, qy, strict=True)
    )
    assert_same_gradients(value, exact, [theta["w"], x])


# ---- drawing


def test_an_epoch_uses_no_example_twice_and_tasks_and_epochs_differ():
    x = torch.arange(4 * 11).view(4, 11)
    drawn = MiniBatches.draw({"x": x}, batch_size=3, steps=7, seed=1)  # an epoch has 3
    steps = [drawn.at(k)["x"] for k in range(7)]
    assert all(each.shape == (4, 3) for each in steps)
    epochs = torch.cat(steps[:3], 1), torch.cat(steps[3:6], 1)
    for task in range(4):
        for epoch in epochs:
            assert len(set(epoch[task].tolist())) == 9
            assert set(epoch[task].tolist()) <= set(x[task].tolist())
    assert not torch.equal(epochs[0], epochs[1])
    assert len({tuple((epochs[0][task] - 11 * task).tolist()) for task in range(4)}) == 4
    assert torch.equal(drawn.at(7)["x"], steps[0])  # starts again


def test_drawn_mini_batches_are_a_function_of_the_seed_and_the_task():
    x = torch.arange(40.0).view(4, 10)
    drawn = MiniBatches.draw(x, batch_size=4, steps=5, seed=3)
    again = MiniBatches.draw(x, batch_size=4, steps=5, seed=3)
    fewer = MiniBatches.draw(x[:2], batch_size=4, steps=5, seed=3)
    other = MiniBatches.draw(x, batch_size=4, steps=5, seed=4)
    for k in range(5):
        assert torch.equal(drawn.at(k), again.at(k))
        assert torch.equal(drawn.at(k)[:2], fewer.at(k))
    assert not torch.equal(drawn.at(0), other.at(0))


# ---- batches, methods, solvers


def test_mini_batches_are_copied_cut_and_moved_with_their_batch():
    support = MiniBatches.draw(data(), batch_size=2, steps=3)
    batch = TaskBatch(support, data())
    copied = batch.clone()
    for step in range(3):
        for mine, theirs in zip(support.at(step), copied.support.at(step), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()
    part = batch.rows(range(1, 3)).support
    for mine, theirs in zip(support.at(2), part.at(2), strict=True):
        assert torch.equal(mine[1:3], theirs)
    other = TaskBatch(MiniBatches.draw(data(), batch_size=2, steps=3, seed=9), data())
    copied.copy_(other)
    for mine, theirs in zip(copied.support.at(1), other.support.at(1), strict=True):
        assert torch.equal(mine, theirs)
    assert batch.to(torch.device("cpu")).support.at(0)[0].shape == (3, 2, 4)


def test_rows_of_a_batch_are_those_of_its_function_of_mini_batches_too():
    x, y = randn(3, 5, 6, 4), randn(3, 5, 6)
    support = MiniBatches(data(), lambda step: (x[:, step], y[:, step]))
    part = TaskBatch(support, data()).rows(range(1, 3)).support
    assert torch.equal(part.data[0], support.data[0][1:3])
    assert torch.equal(part.at(4)[0], x[1:3, 4])
    assert torch.equal(part.at(4)[1], y[1:3, 4])


def test_support_metrics_receive_the_data_of_mini_batches():
    method = IMAML(fit, learned(), lam=LAM, inner=GradientDescent(lr=0.05, steps=5), linear=CG)
    drawn = MiniBatches.draw(data(), batch_size=3, steps=5)

    def metric(params, support, query):
        return fit(params, support)

    got = evaluate(method, [TaskBatch(drawn, data())], {}, tasks=3, support_metrics={"fit": metric})
    want = [
        fit({"w": row}, (drawn.data[0][task], drawn.data[1][task]))
        for task, row in enumerate(method.adapt(drawn)["w"])
    ]
    assert got.mean["support_fit"] == pytest.approx(torch.stack(want).mean().item())


def test_imaml_takes_mini_batches_and_evaluates_with_them():
    method = IMAML(fit, learned(), lam=LAM, inner=GradientDescent(lr=0.05, steps=5), linear=CG)
    support, query = data(), data()
    drawn = MiniBatches.draw(support, batch_size=3, steps=5)
    got = method.meta_gradient(TaskBatch(drawn, query))
    want = implicit_meta_grad(
        fit, method.params, drawn, query, lam=LAM, inner=method.inner, linear=CG
    )
    assert torch.equal(got.params["w"], want.params["w"])
    assert torch.equal(method.adapt(drawn)["w"], want.adapted["w"])
    assert not torch.equal(method.adapt(support)["w"], want.adapted["w"])


def unrolled(theta, turns, query, *, first_order=False):
    """The gradient of the query loss of one task through a step of size 0.05 on each mini-batch."""
    phi = theta
    for x, y in turns:
        value = (x @ phi - y).square().mean()
        (gradient,) = torch.autograd.grad(value, phi, create_graph=not first_order)
        phi = phi - 0.05 * gradient
    x, y = query
    return torch.autograd.grad((x @ phi - y).square().mean(), theta)[0]


@pytest.mark.parametrize("make", [MAML, FOMAML], ids=["maml", "fomaml"])
@pytest.mark.parametrize("solver", [GradientDescent, "step sizes"], ids=["number", "step sizes"])
def test_unrolled_methods_take_a_mini_batch_in_each_step(make, solver):
    params, (x, y), query = learned(), (randn(3, 2, 6, 4), randn(3, 2, 6)), data()
    lr = 0.05 if solver is GradientDescent else StepSize(params, 0.05, form="diagonal", steps=4)
    method = make(fit, params, inner=GradientDescent(lr=lr, steps=4))
    out = method.meta_gradient(TaskBatch(MiniBatches(data(), (x, y)), query))
    want = [
        unrolled(
            params["w"], [(x[i, k % 2], y[i, k % 2]) for k in range(4)],
            (query[0][i], query[1][i]), first_order=make is FOMAML,
        )
        for i in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(out.params["w"], torch.stack(want).mean(0))
    phi = method.adapt(MiniBatches(data(), (x, y)))["w"]
    torch.testing.assert_close(phi, out.adapted["w"])


def test_reptile_and_truncated_maml_take_a_mini_batch_in_each_step():
    params, (x, y), (qx, qy) = learned(), (randn(3, 2, 6, 4), randn(3, 2, 6)), data()
    batch, inner = TaskBatch(MiniBatches(data(), (x, y)), (qx, qy)), GradientDescent(0.05, 4)
    moved = Reptile(fit, params, inner=inner).meta_gradient(batch).params["w"]
    want = []  # steps 0 and 2 are on the support set
    for i in range(3):
        query = qx[i], qy[i]
        turns = [(x[i, 0], y[i, 0]), query, (x[i, 1], y[i, 1]), query]
        want.append(params["w"] - torch_steps(torch.optim.SGD, {"lr": 0.05}, turns, params["w"], 0))
    torch.testing.assert_close(moved, torch.stack(want).mean(0).detach())
    whole = MAML(fit, params, inner=inner).meta_gradient(batch).params["w"]
    last = TruncatedMAML(fit, params, last=4, inner=inner).meta_gradient(batch).params["w"]
    torch.testing.assert_close(last, whole)


def test_an_external_solver_receives_the_mini_batches_whole_and_task_by_task():
    support, seen = data(), []
    x, y = randn(3, 2, 5, 4), randn(3, 2, 5)

    def solve(problem):
        phi = problem.start()
        seen.append(problem.objective_at(1).gradient(phi)[1])
        rows = [one.objective_at(1).gradient(one.start())[1] for one in problem.one_by_one()]
        seen.append(torch.cat(rows))
        return phi

    for batches in ((x, y), lambda step: (x[:, step], y[:, step])):
        seen.clear()
        theta = {"w": randn(4)}
        implicit_meta_grad(
            fit,
            theta,
            MiniBatches(support, batches),
            data(),
            lam=LAM,
            inner=External(solve, takes_mini_batches=True),
        )
        want = [torch.func.grad(fit)(theta, (x[task, 1], y[task, 1]))["w"] for task in range(3)]
        torch.testing.assert_close(seen[0], torch.stack(want))
        torch.testing.assert_close(seen[1], torch.stack(want))


@pytest.mark.parametrize(
    "inner",
    [HessianFree(), LBFGS(), External(lambda problem: problem.start())],
    ids=["hessian-free", "lbfgs", "external"],
)
def test_solvers_that_need_all_examples_refuse_mini_batches(inner):
    problem = regression(3)
    support = MiniBatches.draw(problem.support, batch_size=2, steps=4)
    message = "does not take mini-batches: pass the support set itself"
    with pytest.raises(ValueError, match=message):
        implicit_meta_grad(
            problem.loss, problem.params, support, problem.query, lam=1.0, inner=inner
        )
    method = IMAML(problem.loss, learned_of(problem), lam=1.0, inner=inner)
    with pytest.raises(ValueError, match=message):
        method.adapt(support)


def learned_of(problem):
    return {name: t.clone().requires_grad_() for name, t in problem.params.items()}


@pytest.mark.parametrize("inner", [GradientDescent(tol=1e-3), Adam(tol=1e-3)], ids=["gd", "adam"])
def test_a_tolerance_cannot_be_checked_on_mini_batches(inner):
    drawn = MiniBatches.draw(data(), batch_size=2, steps=4)
    with pytest.raises(ValueError, match=r"tol=0\.001 cannot be checked on mini-batches"):
        implicit_meta_grad(fit, learned(), drawn, data(), lam=LAM, inner=inner)


X = torch.zeros(3, 8, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MiniBatches(X, X[0, 0]), ValueError, r"must be \[B, S"),
        (lambda: MiniBatches(X, (X, X[:, :5])), ValueError, r"every tensor of batches must be"),
        (lambda: MiniBatches(X, X.clone().requires_grad_()), ValueError, "must not require grad"),
        (lambda: MiniBatches(X, None), TypeError, r"batches must be a function of \(step\)"),
        (lambda: MiniBatches(X, lambda: X), TypeError, r"batches must be a function of \(step\)"),
        (lambda: MiniBatches.draw(X, batch_size=9, steps=1), ValueError, "N >= batch_size=9"),
        (lambda: MiniBatches.draw((X, X[:, :5]), batch_size=2, steps=1), ValueError, "same B and"),
        (lambda: MiniBatches.draw(X[0, 0], batch_size=1, steps=1), TypeError, r"\[B, N, \.\.\.\]"),
        (lambda: MiniBatches.draw(X, batch_size=0, steps=1), ValueError, "batch_size must be at"),
        (lambda: MiniBatches.draw(X, batch_size=2, steps=0), ValueError, "steps must be at least"),
    ],
)
def test_invalid_mini_batches_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((randn(2, 5, 4), randn(2, 5)), "mini-batch 0 has 2 tasks, and its data 3"),
        ((randn(3, 5, 4).float(), randn(3, 5)), "the parameters are torch.float64"),
    ],
)
def test_an_invalid_mini_batch_of_a_function_is_refused(batch, message):
    support = MiniBatches(data(), lambda step: batch)
    with pytest.raises((TypeError, ValueError), match=message):
        implicit_meta_grad(fit, learned(), support, data(), lam=LAM)


def test_only_the_support_set_can_be_mini_batches():
    drawn = MiniBatches.draw(data(), batch_size=2, steps=4)
    for method in (IMAML(fit, learned(), lam=LAM), MAML(fit, learned()), Reptile(fit, learned())):
        with pytest.raises(TypeError, match="query cannot be MiniBatches: only support can"):
            method.meta_gradient(TaskBatch(data(), drawn))
