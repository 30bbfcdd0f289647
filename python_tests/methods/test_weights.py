"""Weights of tasks: the gradient is `Σ w_i g_i / Σ w_i`, where g_i is that of task i alone."""

import pytest
import torch
from method_problems import INNER, setting

from imaml_ext import (
    FOMAML,
    IMAML,
    MAML,
    ConjugateGradient,
    GradientDescent,
    Reptile,
    TaskBatch,
    TruncatedMAML,
    implicit_meta_grad,
)
from imaml_ext._tracing import recording

CG = ConjugateGradient(max_iter=4)
WEIGHTS = torch.tensor([2.0, 0.0, 0.5, 3.0], dtype=torch.float64)


def loss(params, data):
    x, y = data
    return ((x @ params["w"]).tanh() * params["scale"] - y).square().mean()


def with_shared(method, params, **settings):
    shared = {"scale": torch.ones((), dtype=torch.float64, requires_grad=True)}
    theta = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}

    def plain(params, data):
        return loss(params, (data[0], data[1][..., 0]))

    return method(plain, theta, inner=INNER, shared=shared, **settings)


def learned_lam(loss, params, **settings):
    lam = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    return IMAML(loss, params, lam=lam, inner=INNER, linear=CG, **settings)


def dense_lam(loss, params, **settings):
    size = sum(t.numel() for t in params.values())
    lam = 20 * torch.eye(size, dtype=torch.float64) + 1
    return IMAML(loss, params, lam=lam.requires_grad_(), inner=INNER, linear=CG, **settings)


METHODS = {
    "imaml": learned_lam,
    "imaml with a dense lam": dense_lam,
    "imaml with shared parameters": lambda _, p, **s: with_shared(
        IMAML, p, lam=1.5, linear=CG, **s
    ),
    "maml with shared parameters": lambda _, p, **s: with_shared(MAML, p, **s),
    "fomaml with shared parameters": lambda _, p, **s: with_shared(FOMAML, p, **s),
    "reptile with shared parameters": lambda _, p, **s: with_shared(Reptile, p, **s),
    "maml": lambda loss, params, **s: MAML(loss, params, inner=INNER, learn_lr=True, **s),
    "truncated": lambda loss, params, **s: TruncatedMAML(loss, params, last=2, inner=INNER, **s),
    "fomaml": lambda loss, params, **s: FOMAML(loss, params, inner=INNER, **s),
    "reptile": lambda loss, params, **s: Reptile(loss, params, inner=INNER, **s),
}


@pytest.fixture(params=list(METHODS))
def make(request):
    return METHODS[request.param]


def chosen(batch, tasks, weights=None):
    parts = (tuple(t[tasks] for t in data) for data in (batch.support, batch.query))
    return TaskBatch(*parts, weights)


def assert_weighted(got, method, batch, weights):
    alone = [method.meta_gradient(chosen(batch, [i])).named() for i in range(len(batch))]
    for name, value in got.named().items():
        total = sum(w * each[name] for w, each in zip(weights.tolist(), alone, strict=True))
        torch.testing.assert_close(value, total / weights.sum())


def test_the_gradient_is_the_weighted_mean_of_those_of_single_tasks(make):
    problem, params, batch = setting("cpu", 4)
    method = make(problem.loss, params)
    whole = TaskBatch(batch.support, batch.query, WEIGHTS)
    assert_weighted(method.meta_gradient(whole), method, batch, WEIGHTS)


@pytest.mark.parametrize("weights", [[1e-300, 1e-300, 2e-300, 0.0], [1e300, 1e308, 1e308, 0.0]])
def test_weights_of_any_size_are_relative(weights):
    problem, params, batch = setting("cpu", 4)
    method = learned_lam(problem.loss, params)
    weights = torch.tensor(weights, dtype=torch.float64)
    got = method.meta_gradient(TaskBatch(batch.support, batch.query, weights))
    assert_weighted(got, method, batch, weights / weights.amax())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_integer_weights_equal_repeated_tasks(make, dtype):
    problem, params, batch = setting("cpu", 3)
    method = make(problem.loss, params)
    weights = torch.tensor([1, 3, 2]).to(dtype)
    got = method.meta_gradient(TaskBatch(batch.support, batch.query, weights))
    want = method.meta_gradient(chosen(batch, [0, 1, 1, 1, 2, 2]))
    torch.testing.assert_close(got.named(), want.named())


@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
def test_padding_of_weight_0_may_be_nan(make, nonfinite):
    problem, params, batch = setting("cpu", 5)
    method = make(problem.loss, params, nonfinite=nonfinite)
    keep = [0, 2, 4]
    want = method.meta_gradient(chosen(batch, keep))
    for data in (batch.support, batch.query):
        data[1][1], data[1][3] = torch.nan, torch.inf
    mask = torch.tensor([True, False, True, False, True])
    got = method.meta_gradient(TaskBatch(batch.support, batch.query, mask))
    torch.testing.assert_close(got.named(), want.named())
    assert not got.failed.any()
    torch.testing.assert_close(got.query_loss[keep], want.query_loss)


def test_a_failed_task_with_a_weight_makes_the_gradient_nan_or_is_omitted(make):
    problem, params, batch = setting("cpu", 4)
    batch.support[1][0] = torch.nan
    keep = [1, 2, 3]
    whole = TaskBatch(batch.support, batch.query, WEIGHTS)
    for nonfinite in ("propagate", "omit"):
        method = make(problem.loss, params, nonfinite=nonfinite)
        got = method.meta_gradient(whole)
        assert got.failed.tolist() == [True, False, False, False]
        if nonfinite == "propagate":
            assert all(t.isnan().all() for t in got.params.values())
        else:
            want = method.meta_gradient(chosen(batch, keep, WEIGHTS[keep]))
            torch.testing.assert_close(got.named(), want.named())


def test_if_all_tasks_with_a_weight_fail_nothing_is_left(make):
    problem, params, batch = setting("cpu", 2)
    batch.support[1][0] = torch.nan
    weights = torch.tensor([1.0, 0.0])
    method = make(problem.loss, params, nonfinite="omit")
    got = method.meta_gradient(TaskBatch(batch.support, batch.query, weights))
    assert all((t == 0).all() for t in got.named().values())
    assert got.failed.tolist() == [True, False]


INVALID = {
    "all 0": [0.0, 0.0, 0.0],
    "negative": [1.0, -1.0, 1.0],
    "NaN": [1.0, torch.nan, 1.0],
    "infinite": [1.0, torch.inf, 1.0],
}


@pytest.mark.parametrize("case", list(INVALID))
def test_invalid_weights_are_refused_or_make_the_gradient_nan(make, case):
    problem, params, batch = setting("cpu", 3)
    weights = torch.tensor(INVALID[case], dtype=torch.float64)
    whole = TaskBatch(batch.support, batch.query, weights)
    method = make(problem.loss, params)
    with pytest.raises(ValueError, match="weights must be finite, not negative, and not all 0"):
        method.meta_gradient(whole)
    with recording():  # values are not read, as on CUDA
        got = method.meta_gradient(whole)
    assert all(t.isnan().all() for t in got.named().values())
    assert got.failed.all()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(2), ValueError, r"weights must be \[3\] on cpu, one for each task, got \[2\]"),
        (torch.ones(()), ValueError, r"got \[\] on cpu"),
        (torch.ones(3, requires_grad=True), ValueError, "weights are constants: detach it, or use"),
        ([1.0, 1.0, 1.0], TypeError, "weights must be a tensor of real numbers, got list"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "got torch.complex64"),
    ],
    ids=["another size", "0-d", "requires grad", "a list", "complex"],
)
def test_what_is_no_weight_of_each_task_is_refused(weights, error, message):
    problem, params, batch = setting("cpu", 3)
    params = {name: t.detach() for name, t in params.items()}
    with pytest.raises(error, match=message):
        implicit_meta_grad(
            problem.loss, params, batch.support, batch.query, lam=1.0, weights=weights
        )


def test_the_gradient_of_a_lam_per_task_has_the_weight_of_its_task():
    problem, params, batch = setting("cpu", 4)
    params = {name: t.detach() for name, t in params.items()}
    lam = torch.tensor([20.0, 25.0, 30.0, 35.0], dtype=torch.float64)
    settings = {"inner": GradientDescent(lr=0.02, steps=5), "linear": CG}
    got = implicit_meta_grad(
        problem.loss, params, batch.support, batch.query, lam=lam, weights=WEIGHTS, **settings
    )
    for i, weight in enumerate(WEIGHTS / WEIGHTS.sum()):
        one = chosen(batch, [i])
        alone = implicit_meta_grad(
            problem.loss, params, one.support, one.query, lam=lam[i], **settings
        )
        torch.testing.assert_close(got.lam[i], weight * alone.lam)
