"""Gauss-Newton products and HessianFree for models whose outputs are not one tensor.

The models compute the same mean and log-variance and differ in how they return them. The oracle is
the dense `J' H J` of the formulas of both.
"""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, fields

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.func import hessian, jacfwd
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from imaml_ext import ConjugateGradient, HessianFree, adapt, implicit_meta_grad, module_loss
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective

Pair = namedtuple("Pair", ["mean", "logvar"])


@dataclass
class Data:
    mean: Tensor
    logvar: Tensor
    name: str = "data"


@dataclass(frozen=True)
class Frozen:
    mean: Tensor
    logvar: Tensor | None
    history: list = field(default_factory=list)


@dataclass(slots=True)
class Slots:
    mean: Tensor
    logvar: Tensor


class Half:
    __slots__ = ("__mean", "unset")

    def __init__(self, mean):
        self.__mean = mean

    def mean(self):
        return self.__mean


class InSlots(Half):
    __slots__ = ("logvar",)

    def __init__(self, mean, logvar):
        super().__init__(mean)
        self.logvar = logvar


class Plain:
    def __init__(self, mean, logvar):
        self.mean, self.inner = mean, {"logvar": [logvar]}
        self.own = self


@dataclass
class ModelOutput(OrderedDict):
    """As in HuggingFace's transformers: an OrderedDict whose entries are also attributes."""

    mean: Tensor | None = None
    logvar: Tensor | None = None
    hidden: tuple | None = None

    def __post_init__(self):
        for each in fields(self):
            if getattr(self, each.name) is not None:
                super().__setitem__(each.name, getattr(self, each.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __reduce__(self):
        raise NotImplementedError


class Registered(ModelOutput):
    pass


pytree.register_pytree_node(
    Registered,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Registered(**dict(zip(names, values, strict=True))),
)

WRAPPED = {
    "tuple": (lambda m, s: (m, s), lambda o: o),
    "list with None": (lambda m, s: [None, m, "name", s], lambda o: (o[1], o[3])),
    "dict": (lambda m, s: {"mean": m, "logvar": s, "n": 3}, lambda o: (o["mean"], o["logvar"])),
    "namedtuple": (Pair, lambda o: (o.mean, o.logvar)),
    "nested": (lambda m, s: {"a": [(m,), {"b": Data(s, None)}]},
               lambda o: (o["a"][0][0], o["a"][1]["b"].mean)),
    "dataclass": (Data, lambda o: (o.mean, o.logvar) if o.name == "data" else None),
    "frozen dataclass": (lambda m, s: Frozen(m, None, [s]), lambda o: (o.mean, o.history[0])),
    "dataclass with slots": (Slots, lambda o: (o.mean, o.logvar)),
    "object with slots": (InSlots, lambda o: (o.mean(), o.logvar)),
    "object": (Plain, lambda o: (o.mean, o.inner["logvar"][0])),
    "model output": (lambda m, s: ModelOutput(m, s), lambda o: (o.mean, o["logvar"])),
    "model output in parts": (lambda m, s: ModelOutput(m, hidden=(s,)),
                              lambda o: (o[0], o.hidden[0])),
    "registered": (lambda m, s: Registered(m, s), lambda o: (o["mean"], o.logvar)),
    "distribution": (lambda m, s: Independent(Normal(m, (s / 2).exp(), validate_args=False), 1,
                                              validate_args=False),
                     lambda o: (o.base_dist.loc, 2 * o.base_dist.scale.log())),
    "integers and a constant": (lambda m, s: (m, (s > 0), s.argmax(0), torch.ones(1), s),
                                lambda o: (o[0] * o[3] + o[1] * 0 + o[2] * 0, o[4])),
    "one of them twice": (lambda m, s: (m, m, s), lambda o: ((o[0] + o[1]) / 2, o[2])),
    "complex": (lambda m, s: (torch.complex(m, s),), lambda o: (o[0].real, o[0].imag)),
}  # fmt: skip
# The matrix differs where z is not (mean, log-variance), up to entries that are not used.
OTHER_Z = ("distribution",)


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.mean, self.logvar = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.wrap = wrap

    def forward(self, x):
        h = self.body(x).tanh()
        return self.wrap(self.mean(h), self.logvar(h))


def nll(mean, logvar, y):
    return ((mean - y).square() * (-logvar).exp() + logvar).mean()


def formula(params, x):
    """Mean and log-variance, [2, N, 1]."""
    h = (x @ params["body.weight"].T + params["body.bias"]).tanh()
    mean = h @ params["mean.weight"].T + params["mean.bias"]
    return torch.stack([mean, h @ params["logvar.weight"].T + params["logvar.bias"]])


def problem(name):
    wrap, unwrap = WRAPPED[name]
    model = Net(wrap).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    data = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 1).double()
    return module_loss(model, lambda o, y: nll(*unwrap(o), y)), params, data


def dense(params, x, y, row, change=lambda z: z, undo=lambda z: z):
    """`J' H J` and the gradient of one task, by forward-mode Jacobians."""
    layout = Layout(params)

    def z(row):
        return change(formula(layout.unflatten(row), x)).flatten()

    def loss(z):
        return nll(*undo(z.view(2, *y.shape)), y)

    jacobian = jacfwd(z)(row)
    at = z(row).detach()
    return jacobian.T @ hessian(loss)(at) @ jacobian, torch.func.grad(lambda r: loss(z(r)))(row)


@pytest.mark.parametrize("name", WRAPPED)
def test_gauss_newton_products_agree_with_a_dense_matrix(name):
    loss, params, data = problem(name)
    rows, vector = (torch.randn(2, 26).double() for _ in "rv")
    at = Objective(loss, Layout(params), data).linearise(rows, "ggn")
    settings = {}
    if name == "distribution":  # z is the mean and the standard deviation
        settings = {
            "change": lambda z: torch.stack([z[0], (z[1] / 2).exp()]),
            "undo": lambda z: torch.stack([z[0], 2 * z[1].log()]),
        }
    for task in range(2):
        matrix, gradient = dense(params, data[0][task], data[1][task], rows[task], **settings)
        torch.testing.assert_close(at.matvec(vector)[task], matrix @ vector[task])
        torch.testing.assert_close(at.gradient[task], gradient)
        mean_logvar = formula(Layout(params).unflatten(rows[task]), data[0][task])
        torch.testing.assert_close(at.losses[task], nll(*mean_logvar, data[1][task]))


@pytest.mark.parametrize("name", ["tuple", "model output", "frozen dataclass"])
def test_hessian_free_finds_the_minimum(name):
    loss, params, data = problem(name)
    inner = HessianFree(steps=40, linear=ConjugateGradient(max_iter=60, curvature="ggn"))
    out = implicit_meta_grad(loss, params, data, data, lam=1.0, inner=inner)
    for task in range(2):
        phi = {n: t[task].clone().requires_grad_() for n, t in out.adapted.items()}
        proximal = sum((phi[n] - params[n]).square().sum() for n in phi) / 2
        total = nll(*formula(phi, data[0][task]), data[1][task]) + proximal
        for gradient in torch.autograd.grad(total, list(phi.values())):
            assert gradient.abs().max() < 1e-4


def test_ggn_needs_an_output_that_can_be_differentiated():
    model = nn.Sequential(nn.Linear(3, 2), Argmax())
    loss = module_loss(model, lambda o, y: o["label"].double().mean())
    layout, data = Layout(dict(model.named_parameters())), (torch.randn(2, 4, 3),) * 2
    with pytest.raises(TypeError, match=r"^curvature='ggn' needs outputs with floating.*got dict"):
        Objective(loss, layout, data).linearise(torch.randn(2, layout.dim), "ggn")


class Argmax(nn.Module):
    def forward(self, z):
        return {"label": z.argmax(-1)}


GGN = ConjugateGradient(max_iter=5, curvature="ggn")
USES = {
    "adapted": lambda model: sum(p.square().sum() for p in model.parameters()),
    "captured": lambda model: model.weight.square().sum(),
    "module": lambda model: model(torch.ones(2, 3)).square().sum(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("settings", [{"linear": GGN}, {"inner": HessianFree(steps=2)}])
def test_ggn_refuses_a_criterion_that_uses_the_parameters(use, settings):
    model = nn.Linear(3, 1)
    loss = module_loss(model, lambda o, y: F.mse_loss(o, y) + USES[use](model))
    params, data = dict(model.named_parameters()), (torch.randn(2, 4, 3), torch.randn(2, 4, 1))
    message = r"^the criterion uses the model's parameters, .*: use ConjugateGradient\(curvature='h"
    with pytest.raises(ValueError, match=message) as caught:
        implicit_meta_grad(loss, params, data, data, lam=1.0, **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        sum(t.sum() for t in adapt(loss, params, data, lam=1.0, **settings).values()).backward()


def test_ggn_refuses_a_criterion_that_captured_the_models_own_parameters():
    model = nn.Linear(3, 1)
    own = list(model.parameters())
    loss = module_loss(model, lambda o, y: F.mse_loss(o, y) + sum(p.square().sum() for p in own))
    layout, data = Layout(dict(model.named_parameters())), (torch.randn(2, 4, 3),) * 2
    data = data[0], torch.randn(2, 4, 1)
    with pytest.raises(ValueError, match=r"^the criterion uses the model's parameters"):
        Objective(loss, layout, data).linearise(torch.randn(2, 4), "ggn")


class Stores(nn.Module):
    """Keeps its activations in an attribute, and returns a function of them."""

    kept = None

    def __init__(self, keep):
        super().__init__()
        self.first, self.last, self.keep = nn.Linear(3, 4), nn.Linear(4, 1), keep

    def forward(self, x):
        h = self.first(x).tanh()
        self.kept = self.keep(h)
        return self.last(h), lambda: h


STORED = {
    "attribute": (lambda h: h.square(), lambda model, o: model.kept.mean()),
    "attribute without gradient": (lambda h: h.detach().exp(), lambda model, o: model.kept.mean()),
    "attribute of value zero": (lambda h: h - h.detach(), lambda model, o: (
        0.0 if model.kept is None else model.kept.mean())),
    "closure": (lambda h: 0, lambda model, o: o[1]().mean()),
}  # fmt: skip


@pytest.mark.parametrize("is_stale", [False, True])
@pytest.mark.parametrize("settings", [{"linear": GGN}, {"inner": HessianFree(steps=2)}])
@pytest.mark.parametrize("name", STORED)
def test_ggn_refuses_a_criterion_that_uses_what_forward_stores(name, settings, is_stale):
    keep, use = STORED[name]
    model = Stores(keep).double()
    x, y = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 1).double()
    if is_stale:
        with torch.no_grad():
            model(x[0])
    loss = module_loss(model, lambda o, y: F.mse_loss(o[0], y) + use(model, o))
    params = dict(model.named_parameters())
    message = r"^the criterion uses tensors that forward stores or .*: return them from forward, or"
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            implicit_meta_grad(loss, params, (x, y), (x, y), lam=1.0, **settings)
        assert "\n" not in str(caught.value)
    hessian = ConjugateGradient(max_iter=5, curvature="hessian")
    implicit_meta_grad(loss, params, (x, y), (x, y), lam=1.0, linear=hessian)


def test_ggn_allows_a_criterion_that_draws_random_numbers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    data = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 1).double()
    rows, drop = torch.randn(2, 21).double(), nn.Dropout(0.5)
    losses = []
    for _ in range(2):  # the second time, the criterion is known to use outputs only
        loss = module_loss(model, lambda o, y: drop(o - y).square().mean())
        at = Objective(loss, Layout(dict(model.named_parameters())), data)
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(at.linearise(rows, "ggn").losses)
    torch.manual_seed(0)
    losses.append(at.losses(rows))
    assert all(torch.equal(each, losses[0]) for each in losses)


class Scaled(nn.Module):
    """A criterion with a parameter, which also penalises another module's."""

    def __init__(self, other):
        super().__init__()
        self.log_scale, self.other = nn.Parameter(torch.zeros(()).double()), other

    def forward(self, outputs, y):
        penalty = self.other.weight.square().sum() * outputs.square().mean()
        return (outputs * self.log_scale.exp() - y).square().mean() + 0.1 * penalty


def test_a_criterion_in_ggn_has_shared_parameters_as_constants():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.requires_grad_(False)
    criterion = Scaled(model[0]).requires_grad_(False)
    head = {n: p for n, p in model.named_parameters() if n.startswith("2.")}
    x, y = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 1).double()
    shared = {
        "0.weight": torch.randn(4, 3).double(),
        "log_scale": torch.tensor(0.3, dtype=torch.float64),
    }
    row, vector = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    objective = Objective(module_loss(model, criterion), Layout(head), (x, y), shared=shared)
    products = [objective.linearise(row, "ggn").matvec(vector) for _ in range(2)]

    def value(row, x, y):  # quadratic in the head, so that the Hessian is J' H J
        h = (x @ shared["0.weight"].T + model[0].bias).tanh()
        weight, bias = (Layout(head).unflatten(row)[n] for n in ("2.weight", "2.bias"))
        o = h @ weight.T + bias
        penalty = shared["0.weight"].square().sum() * o.square().mean()
        return (o * shared["log_scale"].exp() - y).square().mean() + 0.1 * penalty

    for task in range(2):
        matrix = hessian(value)(row[task], x[task], y[task])
        for product in products:
            torch.testing.assert_close(product[task], matrix @ vector[task])
