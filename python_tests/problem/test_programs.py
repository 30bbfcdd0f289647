"""Programs instead of PyTorch's operators: the same meta-gradients, and when they are not used."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

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
    Reptile,
    TaskBatch,
    TruncatedMAML,
    adapt,
    implicit_meta_grad,
    module_loss,
)
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.programs import Programs


def data(*, classes=False, dtype=torch.float64, tasks=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tasks, 6, 4, generator=generator, dtype=dtype)
    y = torch.randn(2, tasks, 6, 3, generator=generator, dtype=dtype)
    if classes:
        y = torch.randint(0, 3, (2, tasks, 6), generator=generator)
    return (x[0], y[0]), (x[1], y[1])


def mlp(*middle, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(middle or (nn.Tanh(),)), nn.Linear(8, 3)).to(dtype)


def solve(loss, params, support, query, **settings):
    settings = {"lam": 3.0, "inner": GradientDescent(lr=0.05, steps=3)} | settings
    return implicit_meta_grad(loss, params, support, query, **settings)


def compare(call, *, tolerance=1e-9):
    """The results of `call` with programs, after a comparison with those without; and Programs."""
    want, programs = call(), Programs()
    with programs.use():
        call()
        got = call()
    assert_close(got.named(), want.named(), rtol=tolerance, atol=tolerance)
    for solve in ("inner", "linear"):
        a, b = getattr(got, solve), getattr(want, solve)
        if a is not None:
            assert torch.equal(a.status, b.status)
            assert torch.equal(a.steps, b.steps)
            assert_close(a.residual, b.residual, rtol=1e-6, atol=1e-9)
    assert_close([got.support_loss, got.query_loss], [want.support_loss, want.query_loss])
    return got, programs


def pieces(programs):
    return {
        name for found in programs._found.values() for name, one in found.items() if one.program
    }


MIDDLES = {
    "tanh": nn.Tanh(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(),
    "layer norm": nn.LayerNorm(8),
    "group norm": nn.GroupNorm(2, 8),
    "deep": nn.Sequential(nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Sigmoid()),
    "batch norm": nn.BatchNorm1d(8, track_running_stats=False),
    "batch norm and relu": nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU()),
    "dropout in eval mode": nn.Dropout(0.5).eval(),
}


@pytest.mark.parametrize(
    ("criterion", "curvature"), [(F.mse_loss, "hessian"), (F.cross_entropy, "ggn")]
)
@pytest.mark.parametrize("middle", MIDDLES)
def test_networks(middle, criterion, curvature):
    model = mlp(MIDDLES[middle])
    loss, params = module_loss(model, criterion), dict(model.named_parameters())
    sets = data(classes=criterion is F.cross_entropy)
    linear = ConjugateGradient(max_iter=4, curvature=curvature)
    _, programs = compare(lambda: solve(loss, params, *sets, linear=linear))
    assert not programs.refusals
    assert pieces(programs) == {"gradient", curvature}


CONVOLUTIONS = {
    "strided": lambda: [nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Tanh()],
    "without bias": lambda: [nn.Conv2d(2, 17, (2, 3), padding=(0, 2), bias=False), nn.ReLU()],
    "deep": lambda: [
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, track_running_stats=False),
        nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False),
        nn.ReLU(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("layers", CONVOLUTIONS)
def test_convolutions(layers, curvature):
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 5, 2, 7, 6, dtype=torch.float64), torch.arange(5) % 4
    body = nn.Sequential(*CONVOLUTIONS[layers](), nn.Flatten()).double()
    features = body(images[0, 0]).shape[1]
    model = nn.Sequential(body, nn.Linear(features, 4, dtype=torch.float64))
    loss, params = module_loss(model, F.cross_entropy), dict(model.named_parameters())
    sets = [(x, labels.expand(3, -1)) for x in images]
    linear = ConjugateGradient(max_iter=3, curvature=curvature)
    _, programs = compare(lambda: solve(loss, params, *sets, lam=20.0, linear=linear))
    assert not programs.refusals


@pytest.mark.parametrize(
    "inner",
    [
        GradientDescent(lr=0.05, steps=5, momentum=0.5, nesterov=True),
        GradientDescent(lr=0.05, steps=60, tol=0.3),
        Adam(steps=4),
        LBFGS(steps=4),
        HessianFree(steps=3),
        HessianFree(steps=2, linear=ConjugateGradient(curvature="hessian")),
    ],
    ids=lambda inner: type(inner).__name__,
)
@pytest.mark.parametrize(
    "linear",
    [
        ConjugateGradient(max_iter=30, rtol=1e-3),
        ConjugateGradient(max_iter=4, preconditioner="jacobi"),
        MINRES(max_iter=4),
        NeumannSeries(max_iter=4, lr=0.05),
    ],
    ids=["CG", "Jacobi", "MINRES", "Neumann"],
)
def test_solvers(inner, linear):
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    _, programs = compare(lambda: solve(loss, params, *data(), inner=inner, linear=linear))
    assert not programs.refusals


def test_forms_of_lam_and_float32():
    model = mlp(nn.ReLU(), dtype=torch.float32)
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    lam = {name: torch.full_like(p, 2.0, requires_grad=True) for name, p in params.items()}
    _, programs = compare(
        lambda: solve(loss, params, *data(dtype=torch.float32), lam=lam), tolerance=1e-4
    )
    assert not programs.refusals


def test_shared_parameters_and_their_new_values():
    model = mlp()
    loss = module_loss(model, F.mse_loss)
    params = {"2.weight": model[2].weight, "2.bias": model[2].bias}
    shared = {"0.weight": model[0].weight, "0.bias": model[0].bias}
    want, programs = solve(loss, params, *data(), shared=shared), Programs()
    with programs.use():
        assert_close(solve(loss, params, *data(), shared=shared).named(), want.named())
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        got = solve(loss, params, *data(), shared=shared)
    assert_close(got.named(), solve(loss, params, *data(), shared=shared).named())
    assert not programs.refusals


@pytest.mark.parametrize(
    "method", ["MAML", "lam", "learned rate", "truncated", "FOMAML", "Reptile"]
)
def test_methods(method):
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    inner = GradientDescent(lr=0.05, steps=4, momentum=0.3)
    made = {
        "MAML": lambda: MAML(loss, params, inner=inner),
        "lam": lambda: MAML(loss, params, inner=inner, lam=0.5),
        "learned rate": lambda: MAML(loss, params, inner=inner, learn_lr=True),
        "truncated": lambda: TruncatedMAML(loss, params, inner=inner, last=2),
        "FOMAML": lambda: FOMAML(loss, params, inner=inner),
        "Reptile": lambda: Reptile(loss, params, inner=inner),
    }[method]()
    _, programs = compare(lambda: made.meta_gradient(TaskBatch(*data())))
    assert not programs.refusals
    assert pieces(programs)


def test_an_unrolled_method_evaluates_no_loss_by_pytorch(monkeypatch):
    evaluated, losses = [], Objective._losses
    monkeypatch.setattr(
        Objective, "_losses", lambda self, rows: evaluated.append(self) or losses(self, rows)
    )
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    method, programs = MAML(loss, params, inner=GradientDescent(lr=0.05, steps=4)), Programs()
    for _ in range(8):
        evaluated.clear()
        with programs.use():
            method.meta_gradient(TaskBatch(*data()))
        if not evaluated:
            return
    raise AssertionError("every meta-gradient evaluated a loss")


def test_an_external_solver_and_adapt():
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())

    def descend(problem):
        phi = problem.start()
        for _ in range(3):
            phi = phi - 0.05 * problem.value_and_gradient(phi)[1]
        return phi

    compare(lambda: solve(loss, params, *data(), inner=External(descend)))
    support, query = data()

    def gradients():
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            phi = adapt(loss, params, support, lam=3.0)
            torch.func.vmap(loss)(phi, query).mean().backward()
        return [p.grad.clone() for p in params.values()]

    want = gradients()
    with Programs().use():
        assert_close(gradients(), want)


def test_a_loss_that_is_not_a_module_loss():
    scale = torch.tensor(1.5, dtype=torch.float64)

    def loss(params, data):
        x, y = data["x"], data["y"]
        prediction = torch.tanh(x @ params["w"]) * scale + params["b"]
        weight = data["mask"].to(x.dtype)
        return ((prediction - y).square() * weight[:, None]).sum() / weight.sum()

    generator = torch.Generator().manual_seed(1)
    params = {
        "w": torch.randn(4, 3, dtype=torch.float64, generator=generator),
        "b": torch.zeros(3, dtype=torch.float64),
    }
    support, query = ({"x": x, "y": y, "mask": x[..., 0] > -0.5} for x, y in data())
    _, programs = compare(lambda: solve(loss, params, support, query))
    assert not programs.refusals
    scale.fill_(0.5)  # read at every call
    with programs.use():
        got = solve(loss, params, support, query)
    assert_close(got.named(), solve(loss, params, support, query).named())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=torch.float64)
        self.dropout = nn.Dropout(0.0)
        self.factor = 1.0
        self.register_buffer("shift", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        x = x.tanh() if self.training else x
        return self.linear(x) * self.factor + self.shift


def test_changes_of_a_model_are_noticed():
    torch.manual_seed(0)
    model = Scaled()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    programs = Programs()

    def check():
        with programs.use():
            got = solve(loss, params, *data())
        assert_close(got.named(), solve(loss, params, *data()).named())

    check()
    model.eval()
    check()
    model.factor = 2.0
    check()
    handle = model.register_forward_hook(lambda module, args, output: 2 * output)
    check()
    handle.remove()
    model.register_forward_hook(lambda module, args, output: -output)
    check()
    model.shift.add_(1.0)
    check()
    model.shift = torch.full_like(model.shift, 3.0)
    check()
    with torch.no_grad():
        model.linear.weight.data = model.linear.weight * 2
    check()
    assert not programs.refusals


def test_attributes_of_objects_are_noticed():
    settings = SimpleNamespace(weight=1.0)
    model = mlp()
    own, params = module_loss(model, F.mse_loss), dict(model.named_parameters())

    def loss(params, data):
        return own(params, data) + settings.weight * params["0.bias"].square().sum()

    programs = Programs()
    for weight in (1.0, 2.0):
        settings.weight = weight
        with programs.use():
            got = solve(loss, params, *data())
        assert_close(got.named(), solve(loss, params, *data()).named())
    assert not programs.refusals


def test_a_program_given_up_in_grad_mode_is_replaced_by_pytorch():
    hidden = [{"factors": SimpleNamespace(one=SimpleNamespace(factor=1.0))}]
    model = mlp()
    own, params = module_loss(model, F.mse_loss), dict(model.named_parameters())

    def loss(params, data):
        return own(params, data) * hidden[0]["factors"].one.factor

    method, programs = MAML(loss, params, inner=GradientDescent(lr=0.05, steps=2)), Programs()
    with programs.use():
        method.meta_gradient(TaskBatch(*data()))
    hidden[0]["factors"].one.factor = 3.0
    with pytest.warns(UserWarning, match="results may have been wrong"), programs.use():
        results = [method.meta_gradient(TaskBatch(*data())) for _ in range(4)]
    assert_close(results[-1].named(), method.meta_gradient(TaskBatch(*data())).named())


def test_replaced_layers_and_globals_are_noticed(monkeypatch):
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())

    def scaled(params, data):
        return (lambda value: value * FACTOR)(loss(params, data))

    programs = Programs()
    for factor in (1.0, 2.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        for layer in (nn.Tanh(), nn.Sigmoid()):
            model[1] = layer
            with programs.use():
                got = solve(scaled, params, *data())
            assert_close(got.named(), solve(scaled, params, *data()).named())
    assert not programs.refusals


FACTOR = 1.0


def test_a_parameter_that_begins_to_require_grad_is_refused_as_without_programs():
    model = mlp()
    model[2].bias.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if name != "2.bias"}
    loss, programs = module_loss(model, F.mse_loss), Programs()
    with programs.use():
        solve(loss, params, *data())
    model[2].bias.requires_grad_(True)
    with programs.use(), pytest.raises(ValueError, match=r"depends on 2\.bias"):
        solve(loss, params, *data())


def test_a_program_that_turns_out_to_be_wrong_is_given_up_with_a_warning():
    hidden = [{"factors": SimpleNamespace(one=SimpleNamespace(factor=1.0))}]

    def loss(params, data):
        return params["w"].square().sum() * hidden[0]["factors"].one.factor + data.sum()

    params, data = {"w": torch.ones(3, dtype=torch.float64)}, torch.ones(2, 1, dtype=torch.float64)
    programs = Programs()

    def gradient():
        with programs.use():
            return solve(loss, params, data, data).params["w"]

    gradient()
    hidden[0]["factors"].one.factor = 2.0
    with pytest.warns(UserWarning, match="not that of the traced operators"):
        results = [gradient() for _ in range(8)]
    assert_close(results[-1], solve(loss, params, data, data).params["w"])


def test_programs_can_be_copied_and_threads_can_record():
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    want = solve(loss, params, *data()).params["0.weight"]

    def call(programs):
        with programs.use():
            return solve(loss, params, *data()).params["0.weight"]

    programs = Programs()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, [programs] * 4 + [Programs() for _ in range(4)]))
    copies = copy.deepcopy(programs), pickle.loads(pickle.dumps(programs))
    for got in (*results, *map(call, copies)):
        assert_close(got, want)


def test_a_loss_that_changes_all_the_time_is_not_recorded_again_and_again():
    model = Scaled()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    programs = Programs()
    for step in range(12):
        model.factor = 1.0 + step
        with programs.use():
            got = solve(loss, params, *data())
        assert_close(got.named(), solve(loss, params, *data()).named())
    assert len(programs._found) == 8
    assert programs.refusals == ["a loss changed more than 8 times"]


def test_a_task_beyond_the_limit_of_memory_uses_pytorch():
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    for most, is_used in ((100, False), (2**20, True)):
        programs = copy.deepcopy(Programs(most))
        with programs.use():
            solve(loss, params, *data())
        assert bool(pieces(programs)) is is_used
        assert all("beyond the cache" in reason for reason in programs.refusals)
        assert bool(programs.refusals) is not is_used


def test_a_new_loss_of_the_same_model_is_not_recorded_again():
    model, programs = mlp(), Programs()
    for _ in range(3):
        loss = module_loss(model, F.mse_loss)
        with programs.use():
            got = solve(loss, dict(model.named_parameters()), *data())
    assert_close(got.named(), solve(loss, dict(model.named_parameters()), *data()).named())
    assert len(programs._found) == 1


def test_losses_without_end_are_not_recorded(monkeypatch):
    monkeypatch.setattr("imaml_ext.problem.programs._MOST", 6)  # 64 would take half a minute
    programs = Programs()
    for _ in range(9):
        model = Scaled()
        loss = module_loss(model, F.mse_loss)
        with programs.use():
            got = solve(
                loss, dict(model.named_parameters()), *data(), inner=GradientDescent(steps=1)
            )
        assert got.params["linear.bias"].isfinite().all()
    assert len(programs._found) == 6
    assert programs.refusals == ["there are more than 6 losses"]


def test_a_large_network_with_fewer_tasks_than_threads_uses_pytorch():
    model = nn.Linear(4, 6000, dtype=torch.float64)
    loss, params = module_loss(model, F.cross_entropy), dict(model.named_parameters())
    sets, programs = data(classes=True), Programs()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with programs.use():
            solve(loss, params, *sets)
    finally:
        torch.set_num_threads(threads)
    assert programs.refusals == ["there are fewer tasks (3) than threads (4)"]


def test_other_shapes_of_the_data_are_recorded_too():
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    programs = Programs()
    for tasks in (1, 2, 5):
        for examples in (2, 6):
            sets = [(x[:, :examples], y[:, :examples]) for x, y in data(tasks=tasks)]
            with programs.use():
                got = solve(loss, params, *sets)
            assert_close(got.named(), solve(loss, params, *sets).named())
    assert len(programs._found) == 2  # any number of tasks


def test_what_cannot_be_recorded_uses_pytorch():
    model = mlp(nn.Dropout(0.5))
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    programs = Programs()
    torch.manual_seed(0)
    want = solve(loss, params, *data())
    torch.manual_seed(0)
    with programs.use():
        got = solve(loss, params, *data())
    assert torch.equal(got.params["0.weight"], want.params["0.weight"])
    assert len(programs.refusals) == 1
    assert not pieces(programs)
    with pytest.raises(RuntimeError, match="cannot be recorded: no program for"):
        programs.check()


def test_the_weight_of_a_convolution_that_all_tasks_share_is_the_stated_reason():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    (x, y), query = data()
    loss = module_loss(model, F.mse_loss)
    head = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    programs = Programs()
    with programs.use():
        solve(loss, head, (x[:, :, None], y), (query[0][:, :, None], query[1]))
    with pytest.raises(RuntimeError, match=r"convolution.* with the same weight for all tasks"):
        programs.check()


def test_a_program_that_differs_from_pytorch_is_not_used(monkeypatch):
    calls = []

    def loss(params, data):  # a different loss in every evaluation
        calls.append(None)
        return (params["w"] * len(calls)).square().sum() + data.sum()

    params = {"w": torch.ones(3, dtype=torch.float64)}
    data = torch.ones(2, 1, dtype=torch.float64)
    programs = Programs()
    with programs.use():
        solve(loss, params, data, data)
    reason = "no program for a loss whose gradient is not that of the traced operators"
    assert programs.refusals[0] == reason


def test_failed_tasks_are_reported():
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    support, query = data()
    support[0][1] = torch.inf
    got, programs = Programs(), Programs()
    with programs.use():
        got = solve(loss, params, support, query)
    assert got.failed.tolist() == [False, True, False]
    assert all(t.isnan().all() for t in got.params.values())


def test_errors_are_the_same():
    model = mlp()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    support, query = data()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with Programs().use():
        with pytest.raises(ValueError, match="params"):
            solve(lambda p, d: loss(p, d) * weight, params, support, query)
        with pytest.raises((RuntimeError, ValueError), match=r"x \[6, 3\] float64 of one task"):
            solve(loss, params, (support[0][..., :3], support[1]), query)


def test_imaml_trains_to_the_same_parameters():
    def train(use):
        model = mlp()
        method = IMAML(module_loss(model, F.mse_loss), dict(model.named_parameters()), lam=3.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        programs = Programs()
        for _ in range(5):
            with programs.use() if use else torch.enable_grad():
                out = method.meta_gradient(TaskBatch(*data()))
            for name, parameter in model.named_parameters():
                parameter.grad = out.params[name]
            optimizer.step()
        return list(model.parameters())

    assert_close(train(True), train(False), rtol=1e-9, atol=1e-12)
