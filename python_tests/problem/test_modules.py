"""Modules with buffers, frozen or tied parameters, parametrizations, and lazy layers.

The oracle is a formula of each model, adapted as in `reference.py`, with a dense solve.
"""

import pytest
import torch
from problems import Problem
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from imaml_ext import (
    FOMAML,
    ConjugateGradient,
    GradientDescent,
    TaskBatch,
    adapt,
    implicit_meta_grad,
    module_loss,
    reference,
)
from imaml_ext.problem.layout import Layout

SETTINGS = {
    "lam": 2.0,
    "inner": GradientDescent(lr=0.05, steps=12),
    "linear": ConjugateGradient(max_iter=80, rtol=1e-14),
}


def points(features=3):
    x = torch.randn(3, 7, features, dtype=torch.float64)
    return x, torch.randn(3, 7, 1, dtype=torch.float64)


def tokens():
    return torch.randint(6, (3, 9)), torch.randint(6, (3, 9))


def assert_agrees(model, formula, criterion=F.mse_loss, data=points, frozen=()):
    """The meta-gradient of the module is that of `formula(params, x)`."""
    model.double()
    params = {n: p.detach() for n, p in model.named_parameters() if not n.startswith(frozen)}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    support, query = data(), data()
    out = implicit_meta_grad(module_loss(model, criterion), params, support, query, **SETTINGS)

    def loss(params, data):
        return criterion(formula(params, data[0]), data[1])

    problem = Problem(loss, params, support, query, Layout(params))
    theta = problem.layout.flatten(params)
    rows = []
    for task in range(3):
        one = tuple(t[task] for t in support)
        lam = torch.full_like(theta, 2.0)
        rows.append(reference.inner_gradient_descent(problem.flat_loss, theta, one, lam, 0.05, 12))
    phi = torch.stack(rows)
    torch.testing.assert_close(problem.layout.flatten(out.adapted), phi)
    matrix = problem.hessians(phi) + 2.0 * torch.eye(len(theta)).double()
    assert torch.linalg.eigvalsh(matrix).min() > 0.1
    want = 2.0 * torch.linalg.solve(matrix, problem.query_gradients(phi)).mean(0)
    torch.testing.assert_close(problem.layout.flatten(out.params), want, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return out


def test_batch_norm_in_eval_mode_uses_its_running_statistics_unchanged():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    norm = model[1]
    norm.running_mean.copy_(torch.randn(4))
    norm.running_var.copy_(torch.rand(4) + 0.5)

    def formula(p, x):
        h = x @ p["0.weight"].T + p["0.bias"]
        h = (h - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
        return h.tanh() @ p["3.weight"].T + p["3.bias"]

    assert_agrees(model.eval(), formula)


class Scaled(nn.Module):
    """Parameters and buffers in every type of container."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.0]))
        self.register_buffer("absent", None)
        self.register_buffer("shift", torch.tensor(0.3), persistent=False)
        self.rows = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.named = nn.ParameterDict({"a": torch.randn(2), "b": nn.Parameter(torch.randn(1))})
        self.nested = nn.ModuleDict({"x": nn.ModuleList([nn.Linear(1, 1)])})

    def forward(self, x):
        h = torch.stack([(x * self.scale) @ row for row in self.rows], dim=-1) + self.shift
        return self.nested["x"][0](h.tanh() @ self.named["a"][:, None]) + self.named["b"]


def test_constant_buffers_and_containers_of_parameters_are_supported():
    def formula(p, x):
        x = x * torch.tensor([0.5, 2.0, 1.0])
        h = (x @ torch.stack([p["rows.0"], p["rows.1"]]).T + model.shift).tanh()
        w, b = p["nested.x.0.weight"], p["nested.x.0.bias"]
        return w * (h @ p["named.a"])[:, None] + b + p["named.b"]

    model = Scaled()
    out = assert_agrees(model, formula)
    assert len(out.params) == 6


class WeightNorm(nn.Module):
    """A length and a direction for each output."""

    def forward(self, length, direction):
        return length * direction / direction.norm(dim=1, keepdim=True)

    def right_inverse(self, weight):
        return weight.norm(dim=1, keepdim=True), weight


def weight_norm_formula(p, x):
    g, v = (p[f"0.parametrizations.weight.original{k}"] for k in (0, 1))
    weight = g * v / v.square().sum(1, keepdim=True).sqrt()
    return (x @ weight.T + p["0.bias"]).tanh() @ p["2.weight"].T + p["2.bias"]


def test_the_original_parameters_of_a_parametrization_are_adapted():
    first = nn.Linear(3, 4)
    parametrize.register_parametrization(first, "weight", WeightNorm())
    assert_agrees(nn.Sequential(first, nn.Tanh(), nn.Linear(4, 1)), weight_norm_formula)


def test_pytorchs_weight_norm_is_rejected_since_its_second_derivative_is_wrong():
    first = parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 1)).double()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    message = r"^the loss has a wrong second derivative in PyTorch \(WeightNorm.*v.norm\(dim=1"
    with pytest.raises(RuntimeError, match=message):
        implicit_meta_grad(loss, params, points(), points(), lam=1.0)
    batch = TaskBatch(points(), points())
    assert FOMAML(loss, params).meta_gradient(batch).params["2.weight"].isfinite().all()
    # If this fails, PyTorch has been fixed, and the check can be removed.
    g, v = (t.detach().requires_grad_() for t in first.parametrizations.weight.parameters())
    assert not torch.autograd.gradgradcheck(
        lambda v: torch._weight_norm(v, g), (v,), raise_exception=False
    )


def test_spectral_norm_in_eval_mode_divides_by_its_stored_estimate():
    def formula(p, x):
        weight = p["0.parametrizations.weight.original"]
        weight = weight / (norm._u @ weight @ norm._v)
        return (x @ weight.T + p["0.bias"]).tanh() @ p["2.weight"].T + p["2.bias"]

    first = parametrizations.spectral_norm(nn.Linear(3, 4))
    norm = first.parametrizations.weight[0]
    assert_agrees(nn.Sequential(first, nn.Tanh(), nn.Linear(4, 1)).eval(), formula)


class Tied(nn.Module):
    """A language model of one token whose output layer has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.hidden(self.embedding(x)).tanh())


def tied_formula(p, x):
    both = p["embedding.weight"]
    return (both[x] @ p["hidden.weight"].T + p["hidden.bias"]).tanh() @ both.T


def test_tied_weights_are_one_parameter():
    out = assert_agrees(Tied(), tied_formula, F.cross_entropy, tokens)
    assert list(out.params) == ["embedding.weight", "hidden.weight", "hidden.bias"]


def test_tied_weights_may_be_passed_under_either_name():
    model = Tied().double()
    support, query = tokens(), tokens()
    loss, params = module_loss(model, F.cross_entropy), dict(model.named_parameters())
    want = implicit_meta_grad(loss, params, support, query, **SETTINGS)
    params["output.weight"] = params.pop("embedding.weight")
    got = implicit_meta_grad(loss, params, support, query, **SETTINGS)
    torch.testing.assert_close(got.params["output.weight"], want.params["embedding.weight"])


def test_a_tied_tensor_under_both_names_is_rejected():
    model = Tied()
    params = dict(model.named_parameters(remove_duplicate=False))
    for call in (
        lambda: implicit_meta_grad(module_loss(model, F.cross_entropy), params, *[tokens()] * 2,
                                   lam=1.0),
        lambda: adapt(module_loss(model, F.cross_entropy), params, tokens(), lam=1.0),
    ):  # fmt: skip
        with pytest.raises(
            ValueError,
            match=r"'output.weight'\] is the same tensor as params\['embedding.weight'\]",
        ):
            call()


def test_frozen_parameters_keep_the_models_values():
    def formula(p, x):
        h = x @ model[0].weight.T + model[0].bias
        return h.tanh() @ p["2.weight"].T + p["2.bias"]

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    out = assert_agrees(model, formula, frozen="0.")
    assert list(out.params) == ["2.weight", "2.bias"]


def test_a_lazy_layer_works_after_its_first_call():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))
    loss = module_loss(model, F.mse_loss)
    with pytest.raises(ValueError, match=r"params\['0.weight'\] has no shape yet: call the lazy"):
        implicit_meta_grad(loss, dict(model.named_parameters()), points(), points(), lam=1.0)
    model(points()[0][0].float())

    def formula(p, x):
        return (x @ p["0.weight"].T + p["0.bias"]).tanh() @ p["2.weight"].T + p["2.bias"]

    assert_agrees(model, formula)


class Writer(nn.Module):
    """Writes its buffer in forward."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.how == "counts":
            self.seen += 1
        elif self.how == "averages":
            self.seen.mul_(0.9).add_(x.mean())
        elif self.how == "replaces":
            self.seen = x.mean()
        return self.linear(x)


SHARED = {
    "counts": (ValueError, r"^1 \(Writer\) writes its buffer 'seen' in forward, which tasks"),
    "replaces": (ValueError, r"^1 \(Writer\) writes its buffer 'seen' in forward, which tasks"),
    "averages": (RuntimeError, r"^1 \(Writer\) writes to a tensor that all tasks share: track no"),
}


@pytest.mark.parametrize("how", SHARED)
def test_a_buffer_written_in_forward_is_named(how):
    error, message = SHARED[how]
    model = nn.Sequential(nn.Linear(3, 3), Writer(how)).double()
    kept = model[1].seen
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    with pytest.raises(error, match=message) as caught:
        implicit_meta_grad(loss, params, points(), points(), lam=1.0)
    assert "\n" not in str(caught.value)
    is_kept = model[1].seen is kept  # pytest could not print a tensor of vmap
    assert is_kept
    model[1].how = "reads"
    implicit_meta_grad(loss, params, points(), points(), lam=1.0)


def test_layers_that_track_statistics_in_training_mode_are_named():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 1)).double()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    where = r"^0.parametrizations.weight.0 \(_SpectralNorm\) writes to a tensor .*eval\(\)"
    with pytest.raises(RuntimeError, match=where):
        implicit_meta_grad(loss, params, points(), points(), lam=1.0)
    model.eval()
    implicit_meta_grad(loss, params, points(), points(), lam=1.0)

    model = nn.Sequential(nn.InstanceNorm1d(7, track_running_stats=True), nn.Linear(3, 1)).double()
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"^0 \(InstanceNorm1d\) would update its running"):
        implicit_meta_grad(loss, params, points(), points(), lam=1.0)
    model.eval()
    implicit_meta_grad(loss, params, points(), points(), lam=1.0)


def test_a_class_as_criterion_is_rejected():
    with pytest.raises(TypeError, match=r"got the class MSELoss: pass MSELoss\(\)$"):
        module_loss(nn.Linear(1, 1), nn.MSELoss)
