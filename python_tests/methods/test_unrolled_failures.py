"""Failed tasks, and settings that are refused, in the methods that unroll the inner solver."""

import pytest
import torch
from unrolled_loop import batch, definite, query_loss, shared, support_loss, theta

from imaml_ext import (
    FOMAML,
    IMAML,
    MAML,
    Adam,
    GradientDescent,
    MultiStepLoss,
    ProximalStrength,
    Reptile,
    StepSize,
    TaskBatch,
    TruncatedMAML,
)
from imaml_ext._tracing import recording

OMITTING = {
    "maml": lambda **s: MAML(
        support_loss, (p := theta()), shared=shared(), query_loss=query_loss, lam=definite(),
        inner=Adam(lr=StepSize(p, form="diagonal", steps=3), steps=3), **s,
    ),
    "weighted": lambda **s: MAML(
        support_loss, theta(), shared=shared(), query_loss=query_loss,
        inner=GradientDescent(steps=3), step_weights=torch.tensor([0.2, 0.3, 0.5]).double(), **s,
    ),
    "truncated": lambda **s: TruncatedMAML(
        support_loss, (p := theta()), shared=shared(), last=1, lam=ProximalStrength(p),
        inner=GradientDescent(steps=3), **s,
    ),
    "first order": lambda **s: FOMAML(
        support_loss, (p := theta()), shared=shared(),
        inner=GradientDescent(lr=StepSize(p, form="tensor"), steps=3), **s,
    ),
    "reptile": lambda **s: Reptile(
        support_loss, theta(), shared=shared(), inner=Adam(steps=3, eps=0.1), **s
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [torch.nan, 1e200])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("make", OMITTING.values(), ids=OMITTING)
def test_a_failed_task_is_omitted_from_every_gradient(make, recorded, value):
    method, data = make(nonfinite="omit"), batch(5)
    bad = TaskBatch((data.support[0], data.support[1].clone()), data.query)
    bad.support[1][2] = value
    keep = [0, 1, 3, 4]
    rest = TaskBatch(*(tuple(t[keep] for t in part) for part in (data.support, data.query)))
    want = method.meta_gradient(rest)
    if recorded:
        with recording():
            got, same = method.meta_gradient(bad), method.meta_gradient(rest)
        for name, gradient in want.named().items():
            torch.testing.assert_close(same.named()[name], gradient, rtol=1e-9, atol=1e-12)
    else:
        got = method.meta_gradient(bad)
    assert got.failed.tolist() == [False, False, True, False, False]
    for name, gradient in want.named().items():
        torch.testing.assert_close(got.named()[name], gradient, rtol=1e-9, atol=1e-12)
    method.nonfinite = "propagate"
    assert all(gradient.isnan().any() for gradient in method.meta_gradient(bad).named().values())


def test_the_shared_gradient_of_a_batch_whose_tasks_all_fail_is_zero():
    method, data = OMITTING["maml"](nonfinite="omit"), batch(2)
    data.query[1][:] = torch.nan
    got = method.meta_gradient(data)
    assert got.failed.all()
    assert all((gradient == 0).all() for gradient in got.named().values())


def test_what_cannot_be_learned_or_does_not_fit_is_refused():
    params, psi = theta(), shared()
    rate = StepSize(params, steps=3)
    three, two = (GradientDescent(lr=rate, steps=k) for k in (3, 2))
    other = GradientDescent(lr=StepSize({"w": torch.zeros(2).double()}, form="tensor"))
    unused = psi | {"x": psi["body"]}
    cases = [
        ("freeze|requires_grad_", lambda: Reptile(support_loss, params, inner=three, shared=psi)),
        ("does not depend on the step size", lambda: IMAML(support_loss, params, inner=three)),
        ("is for 3 steps, but the solver takes 2", lambda: MAML(support_loss, params, inner=two)),
        (r"is for parameters w \[2\]", lambda: MAML(support_loss, params, inner=other)),
        ("got a StepSize: remove", lambda: MAML(support_loss, params, inner=three, learn_lr=True)),
        ("also in params", lambda: MAML(support_loss, params, shared={"head": psi["body"]})),
        ("same tensor", lambda: MAML(support_loss, params, shared=unused)),
        (
            "use MAML",
            lambda: TruncatedMAML(
                support_loss, params, last=1, step_weights=MultiStepLoss(16, 9), shared=psi
            ),
        ),
        (
            "last must be at least 1",
            lambda: TruncatedMAML(support_loss, params, last=0, inner=three),
        ),
        (
            "lr as a float",
            lambda: MAML(support_loss, params, inner=three, lam=1.0, accelerated=True),
        ),
        (
            "got Adam",
            lambda: MAML(support_loss, params, inner=Adam(), lam=1.0, accelerated=True),
        ),
        (
            r"of shape \[16\]",
            lambda: MAML(support_loss, params, step_weights=torch.ones(3)),
        ),
        (
            "is for 3 steps, but the inner solver takes 16",
            lambda: MAML(support_loss, params, step_weights=MultiStepLoss(3, 9)),
        ),
        (
            "step_weights requires grad",
            lambda: MAML(support_loss, params, step_weights=torch.ones(16, requires_grad=True)),
        ),
        ("form must be one of", lambda: StepSize(params, form="dense")),
        ("steps must be at least 1", lambda: StepSize(params, steps=0)),
        ("initial must be positive", lambda: StepSize(params, 0.0)),
        ("anneal must be at least 1", lambda: MultiStepLoss(3, 0)),
    ]
    for message, make in cases:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="step_weights must be a tensor, or a function"):
        MAML(support_loss, params, step_weights=0.5)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 0, 1, 1]).double()])
def test_a_lam_that_makes_its_task_diverge_spoils_no_other_gradient(weights):
    lam = torch.tensor([0.5, 0.6, 1e300, 0.7, 0.8], dtype=torch.float64)
    data, keep = batch(5), [0, 1, 3, 4]
    rest = TaskBatch(
        *(tuple(t[keep] for t in part) for part in (data.support, data.query)),
        None if weights is None else weights[keep],
    )
    settings = {"shared": shared(), "query_loss": query_loss, "inner": GradientDescent(steps=3)}
    params, whole = theta(), TaskBatch(data.support, data.query, weights)
    got, want = (
        MAML(support_loss, params, lam=of_tasks, nonfinite="omit", **settings).meta_gradient(tasks)
        for of_tasks, tasks in ((lam, whole), (lam[keep], rest))
    )
    assert got.failed.tolist() == [False, False, weights is None, False, False]
    for name, gradient in want.named().items():
        torch.testing.assert_close(got.named()[name], gradient)


@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
@pytest.mark.parametrize("make", [MAML, Reptile])
def test_a_shared_gradient_that_is_not_finite_fails_all_tasks(make, nonfinite):
    def loss(params, data):  # the derivative of the root is infinite at 0
        return support_loss(params, data) + params["offset"].abs().sqrt()

    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    more = {**shared(), "offset": offset}
    method = make(loss, theta(), shared=more, nonfinite=nonfinite)
    out = method.meta_gradient(batch(3))
    assert out.failed.all()
    assert out.shared["offset"].isnan() if nonfinite == "propagate" else out.shared["offset"] == 0
