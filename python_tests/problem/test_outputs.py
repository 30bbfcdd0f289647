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
