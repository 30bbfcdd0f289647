"""What all methods have in common, and the proximal strength that they may learn."""

import pytest
import torch
from method_problems import INNER, derivative, setting
from problems import regression

from imaml_ext import (
    FOMAML,
    IMAML,
    MAML,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    ProximalStrength,
    Reptile,
    TaskBatch,
    TruncatedMAML,
    conjugate_gradient,
    module_loss,
)
from imaml_ext.problem.lam import flatten_lam
from imaml_ext.problem.layout import Layout
from imaml_ext.solvers.solution import Status

ALL = {
    "imaml": lambda loss, params, **s: IMAML(loss, params, lam=1.5, inner=INNER, **s),
    "maml": lambda loss, params, **s: MAML(loss, params, inner=INNER, **s),
    "accelerated": lambda loss, params, **s: MAML(
        loss, params, inner=INNER, lam=1.5, accelerated=True, **s
    ),
    "truncated": lambda loss, params, **s: TruncatedMAML(loss, params, last=2, inner=INNER, **s),
    "fomaml": lambda loss, params, **s: FOMAML(loss, params, inner=INNER, **s),
    "reptile": lambda loss, params, **s: Reptile(loss, params, inner=INNER, **s),
}


@pytest.fixture(params=list(ALL))
def make(request):
    return ALL[request.param]


def test_the_gradient_of_a_batch_is_the_mean_over_its_tasks(make, device):
    problem, params, batch = setting(device, 4)
    method = make(problem.loss, params)
    whole = method.meta_gradient(batch)
    alone = []
    for i in range(4):
        one = TaskBatch(*(tuple(t[i : i + 1] for t in d) for d in (batch.support, batch.query)))
        alone.append(problem.layout.flatten(method.meta_gradient(one).params))
    torch.testing.assert_close(problem.layout.flatten(whole.params), torch.stack(alone).mean(0))


def test_a_failing_task_makes_the_gradient_nan_or_is_omitted(make, device):
    problem, params, batch = setting(device, 16)
    x, y = (t.clone() for t in batch.support)
    y[7] = torch.nan
    bad = TaskBatch((x, y), batch.query)
    propagated = make(problem.loss, params).meta_gradient(bad)
    assert propagated.inner.status[7] == Status.NONFINITE
    assert propagated.failed.nonzero().flatten().tolist() == [7]
    assert all(t.isnan().all() for t in propagated.params.values())
    keep = [i for i in range(16) if i != 7]
    rest = TaskBatch(*(tuple(t[keep] for t in d) for d in (batch.support, batch.query)))
    omitted = make(problem.loss, params, nonfinite="omit").meta_gradient(bad)
    want = make(problem.loss, params).meta_gradient(rest)
    for name in params:
        torch.testing.assert_close(omitted.params[name], want.params[name])


def test_float32_is_close_to_float64(make, device):
    problem, params, batch = setting(device)
    single = problem.to(torch.float32)
    singles = {name: t.requires_grad_() for name, t in single.params.items()}
    got = make(single.loss, singles).meta_gradient(TaskBatch(single.support, single.query))
    want = make(problem.loss, params).meta_gradient(batch)
    a = single.layout.flatten(got.params).double()
    b = problem.layout.flatten(want.params)
    assert (a - b).norm() < 1e-4 * b.norm()


def test_a_single_task_with_a_single_parameter_works(make, dtype, device):
    params = {"w": torch.zeros(1, dtype=dtype, device=device).requires_grad_()}
    data = torch.full((1, 1), 2.0, dtype=dtype, device=device)

    def loss(params, target):
        return 0.5 * ((params["w"] - target) ** 2).sum()

    got = make(loss, params).meta_gradient(TaskBatch(data, data))
    assert got.params["w"].item() < 0  # towards the target
    assert got.params["w"].dtype == dtype


def test_adapt_gives_the_phi_of_the_meta_gradient(make, device):
    problem, params, batch = setting(device)
    method = make(problem.loss, params)
    if isinstance(method, Reptile):
        pytest.skip("trains on the query set too")
    phi, out = method.adapt(batch.support), method.meta_gradient(batch)
    for name in params:
        assert torch.equal(phi[name], out.adapted[name])
        assert not phi[name].requires_grad


def test_the_reported_residual_is_the_gradient_norm_at_phi(make, device):
    problem, params, batch = setting(device)
    method = make(problem.loss, params)
    out = method.meta_gradient(batch)
    phi, theta = problem.layout.flatten(out.adapted), problem.layout.flatten(problem.params)
    lam = 0.0 if getattr(method, "lam", None) is None else method.lam
    gradient = torch.func.vmap(torch.func.grad(problem.flat_loss))(phi, batch.support)
    want = (gradient + lam * (phi - theta)).norm(dim=1)
    torch.testing.assert_close(out.inner.residual, want)
    assert out.inner.steps.tolist() == [5, 5, 5]


# ---- hyperparameters


@pytest.mark.parametrize("form", ["scalar", "tensor", "diagonal", "dense"])
def test_a_proximal_strength_starts_at_its_initial_value_and_stays_positive(form, device):
    problem, params, batch = setting(device)
    strength = ProximalStrength(params, 0.7, form=form)
    flat = flatten_lam(problem.layout, strength())
    eye = torch.eye(25, dtype=torch.float64, device=device)
    matrix = flat if flat.dim() == 2 else torch.diag(flat.expand(25))
    torch.testing.assert_close(matrix, 0.7 * eye)
    method = IMAML(problem.loss, params, lam=strength, inner=INNER)
    optimizer = torch.optim.SGD(method.learned().values(), lr=100.0)
    for _ in range(3):  # steps that would take a bare lam below 0
        gradients = method.meta_gradient(batch).named()
        for name, tensor in method.learned().items():
            if name.startswith("lam."):
                tensor.grad = gradients[name] / gradients[name].norm() / 100
        optimizer.step()
    flat = flatten_lam(problem.layout, strength())  # raises if not positive
    assert (flat != flatten_lam(problem.layout, ProximalStrength(params, 0.7, form=form)())).any()


@pytest.mark.parametrize("form", ["scalar", "tensor", "diagonal", "dense"])
def test_a_proximal_strength_has_the_right_gradient(form, device):
    problem, params, batch = setting(device)
    strength = ProximalStrength(params, 1.2, form=form)
    with torch.no_grad():
        for log in strength.parameters():
            log += 0.1 * torch.randn_like(log).tril() if form == "dense" else 0.1
    inner = GradientDescent.accelerated(lr=0.1, steps=5000, strong_convexity=1.0, tol=1e-13)
    method = IMAML(
        problem.loss, params, lam=strength, inner=inner,
        linear=ConjugateGradient(max_iter=60, rtol=1e-14),
    )  # fmt: skip
    got = method.meta_gradient(batch)
    method.linear = ConjugateGradient(max_iter=1)  # from here on only the loss matters
    logs = dict(strength.named_parameters())
    start = {name: log.detach().clone() for name, log in logs.items()}
    directions = {name: torch.randn_like(log) for name, log in logs.items()}

    def objective(h):
        with torch.no_grad():
            for name, log in logs.items():
                log.copy_(start[name] + h * directions[name])
        return method.meta_gradient(batch).query_loss.mean()

    want = derivative(objective, 0.0, 1.0)
    along = sum((got.hyperparameters[f"lam.{n}"] * d).sum() for n, d in directions.items())
    torch.testing.assert_close(along, want, rtol=1e-6, atol=1e-9)


def test_invalid_settings_are_rejected():
    model = torch.nn.Linear(1, 1)
    loss = module_loss(model, torch.nn.functional.mse_loss)
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match="no tol"):
        MAML(loss, params, inner=GradientDescent(tol=1e-3))
    with pytest.raises(ValueError, match="accelerated needs lam as a float"):
        MAML(loss, params, accelerated=True)
    with pytest.raises(ValueError, match="lam must be positive and finite, or 0, got -1"):
        MAML(loss, params, lam=-1.0)
    with pytest.raises(ValueError, match="last must be at least 0, got -1"):
        TruncatedMAML(loss, params, last=-1)
    for settings in ({"lam": 1.0}, {"learn_lr": True}):
        with pytest.raises(ValueError, match="with lam or learn_lr, last must be at least 1"):
            TruncatedMAML(loss, params, last=0, **settings)
    with pytest.raises(ValueError, match="accelerated sets the momentum"):
        MAML(loss, params, lam=1.0, accelerated=True, inner=GradientDescent(momentum=0.5))
    with pytest.raises(ValueError, match="nonfinite must be"):
        FOMAML(loss, params, nonfinite="ignore")
    with pytest.raises(ValueError, match="form must be one of 'scalar'"):
        ProximalStrength(params, form="banded")
    with pytest.raises(ValueError, match="initial must be positive and finite, got 0"):
        ProximalStrength(params, 0.0)
    x = torch.zeros(3, 2, 1)
    for method in (MAML(loss, params), Reptile(loss, params)):
        with pytest.raises(ValueError, match="support has 3 tasks and query 2"):
            method.meta_gradient(TaskBatch((x, x), (x[:2], x[:2])))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        MAML(loss, params).meta_gradient(TaskBatch((x, x), (x, x)))


MODEL = torch.nn.Linear(1, 1)
LOSS = module_loss(MODEL, torch.nn.functional.mse_loss)


def linear_loss(params, data):
    x, y = data
    return (x @ params["weight"].T + params["bias"] - y).square().mean()


@pytest.mark.parametrize("name", ["loss", "query_loss"])
@pytest.mark.parametrize(
    ("loss", "got"),
    [
        ("mse", "got str"),
        (3, "got int"),
        (torch.nn.functional.mse_loss, "got torch's mse_loss"),
        (torch.nn.MSELoss(), "got torch's MSELoss"),
        (torch.nn.MSELoss, "got the class MSELoss"),
        (MODEL, r"got Linear\(input\)"),
        (lambda params: 0.0, r"got <lambda>\(params\)"),
    ],
)
def test_a_loss_that_is_no_function_of_parameters_and_data_is_refused(make, loss, got, name):
    if make is ALL["reptile"] and name == "query_loss":
        pytest.skip("takes none")
    losses = {"loss": LOSS} | {name: loss}
    with pytest.raises(TypeError, match=rf"^{name} must be a function of \(params, data\), {got}"):
        make(losses.pop("loss"), dict(MODEL.named_parameters()), **losses)


@pytest.mark.parametrize(
    "params",
    [MODEL, list(MODEL.parameters()), MODEL.named_parameters(), None, {"weight": 3}],
    ids=lambda value: type(value).__name__,
)
def test_parameters_that_are_no_mapping_to_tensors_are_refused(make, params):
    with pytest.raises(TypeError, match=r"pass dict\(model.named_parameters\(\)\)"):
        make(LOSS, params)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"inner": "adam"}, TypeError, "inner must be an instance of InnerSolver, got str"),
        ({"inner": GradientDescent}, TypeError, "got the class GradientDescent: pass one"),
        ({"inner": ConjugateGradient()}, TypeError, "got ConjugateGradient"),
        ({"linear": "cg"}, TypeError, "linear must be an instance of LinearSolver, got str"),
        ({"linear": ConjugateGradient}, TypeError, "got the class ConjugateGradient: pass one"),
        ({"linear": conjugate_gradient}, TypeError, "got function: pass one"),
        ({"adapt_proximal": "no"}, ValueError, "adapt_proximal must be one of False, True"),
        (
            {"linear": ConjugateGradient(preconditioner="adam")},
            ValueError,
            r"'adam' needs .* use inner=Adam\(...\), got GradientDescent",
        ),
        (
            {"loss": linear_loss, "linear": ConjugateGradient(curvature="ggn")},
            TypeError,
            "^linear has curvature='ggn', .* build the loss by module_loss",
        ),
        (
            {"loss": linear_loss, "inner": HessianFree()},
            TypeError,
            "^inner.linear has curvature='ggn', .* build the loss by module_loss",
        ),
    ],
)
def test_solvers_that_would_fail_in_every_meta_gradient_are_refused(settings, error, message):
    settings = {"loss": LOSS, "params": dict(MODEL.named_parameters())} | settings
    with pytest.raises(error, match=message):
        IMAML(**settings)


def test_a_flag_that_is_no_bool_is_refused():
    params = dict(MODEL.named_parameters())
    for flag in ("learn_lr", "accelerated"):
        with pytest.raises(ValueError, match=f"{flag} must be one of False, True, got 'no'"):
            MAML(LOSS, params, lam=1.0, **{flag: "no"})


def test_a_batch_may_be_a_pair(make, device):
    problem, params, batch = setting(device)
    want = make(problem.loss, params).meta_gradient(batch)
    got = make(problem.loss, params).meta_gradient((batch.support, batch.query))
    assert all(torch.equal(got.params[name], want.params[name]) for name in params)
    with pytest.raises(TypeError, match="a batch must be TaskBatch"):
        make(problem.loss, params).meta_gradient(batch.support)


def test_a_description_explains_each_status_once(device):
    problem, params, batch = setting(device, 4)
    x, y = (t.clone() for t in batch.support)
    y[2] = torch.nan
    method = IMAML(problem.loss, params, lam=1.5, inner=INNER)
    text = method.meta_gradient(TaskBatch((x, y), batch.query)).describe()
    assert text.count("NONFINITE: 1 of 4 tasks: 2") == 2  # the inner and the linear solve
    assert text.count("lower the inner learning rate") == 1
    assert text.count("(") == text.count(")") == len(set(text.split("(")[1:]))


def test_a_nonfinite_gradient_fails_its_task_even_if_the_losses_are_finite(device):
    # The derivative of the norm at 0 is 0 / 0, for the task whose target is theta.
    theta = torch.zeros(3, dtype=torch.float64, device=device)
    target = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64, device=device)

    def support_loss(params, data):
        return (params["w"] ** 2).sum() + 0 * data.sum()

    def query_loss(params, data):
        return ((params["w"] - data) ** 2).sum().sqrt()

    batch = TaskBatch(target, target)
    for kind in (MAML, FOMAML, IMAML):
        for nonfinite in ("propagate", "omit"):
            params = {"w": theta.clone().requires_grad_()}
            method = kind(support_loss, params, query_loss=query_loss, nonfinite=nonfinite)
            out = method.meta_gradient(batch)
            assert out.query_loss.isfinite().all()
            assert out.failed.tolist() == [False, True]
            assert out.params["w"].isfinite().all() == (nonfinite == "omit")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_a_failed_task_is_omitted_from_the_gradient_of_the_step_size(value, device):
    problem, params, batch = setting(device, 6)
    x, y = (t.clone() for t in batch.support)
    y[2] = value
    bad = TaskBatch((x, y), batch.query)
    keep = [0, 1, 3, 4, 5]
    rest = TaskBatch(*(tuple(t[keep] for t in d) for d in (batch.support, batch.query)))
    settings = {"inner": INNER, "learn_lr": True, "nonfinite": "omit"}
    got = MAML(problem.loss, params, **settings).meta_gradient(bad)
    want = MAML(problem.loss, params, **settings).meta_gradient(rest)
    assert got.failed.nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(got.hyperparameters["log_lr"], want.hyperparameters["log_lr"])


def test_a_frozen_proximal_strength_is_not_learned(device):
    problem, params, batch = setting(device)
    strength = ProximalStrength(params, 1.5, form="tensor").requires_grad_(False)
    method = IMAML(problem.loss, params, lam=strength, inner=INNER)
    assert method.learned().keys() == params.keys()
    out = method.meta_gradient(batch)
    want = IMAML(problem.loss, params, lam=1.5, inner=INNER).meta_gradient(batch)
    for name in params:
        torch.testing.assert_close(out.params[name], want.params[name])


def test_a_dense_proximal_strength_is_positive_definite_in_float32(device):
    params = {"w": torch.zeros(50, device=device)}
    for _ in range(20):
        strength = ProximalStrength(params, 1.0, form="dense")
        with torch.no_grad():
            strength.log.copy_(torch.randn(50, 50))
        flatten_lam(Layout(params), strength())  # raises if it is not


def test_a_dense_proximal_strength_is_computed_in_float32_under_autocast(device):
    problem = regression(3, device).to(torch.float32)
    params = {name: t.requires_grad_() for name, t in problem.params.items()}
    batch = TaskBatch(problem.support, problem.query)
    method = IMAML(
        problem.loss, params, lam=ProximalStrength(params, 1.5, form="dense"),
        inner=HessianFree(steps=3),
    )  # fmt: skip
    want = method.meta_gradient(batch)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = method.meta_gradient(batch)
    for name in params:
        assert got.params[name].dtype == torch.float32
        torch.testing.assert_close(got.params[name], want.params[name], rtol=0.1, atol=0.02)
