"""What changes between `adapt` and `backward`, or in an evaluation of the loss."""

import pytest
import torch
from ridge_problems import EXACT, LAM, data, fit, learned, randn, squared
from torch import nn
from torch.func import functional_call, vmap

from imaml_ext import External, GradientDescent, HessianFree, adapt, implicit_meta_grad, module_loss


def frozen_below():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(8),
                          nn.Linear(8, 1)).double().eval()  # fmt: skip
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    return model, {n: p for n, p in model.named_parameters() if n.startswith("4.")}


CHANGES = {
    "data in place": (lambda model, s: s[0].normal_(), r"support \(tensor 0\) was modified"),
    "labels in place": (lambda model, s: s[1].normal_(), r"support \(tensor 1\) was modified"),
    "a frozen weight": (lambda model, s: model[0].weight.mul_(1.5), r"0\.weight.* was modified"),
    "the .data of a weight": (
        lambda model, s: setattr(model[0].weight, "data", torch.zeros(8, 4).double()),
        r"0\.weight.* was modified",
    ),
    "a buffer": (lambda model, s: model[3].running_mean.add_(1.0), r"3\.running_mean.* was modi"),
    "training mode": (
        lambda model, s: model.train(),
        r"1 \(Dropout\) was in eval\(\) mode in adapt and is in train\(\) mode in backward",
    ),
    "training mode of a layer": (lambda model, s: model[1].train(), r"1 \(Dropout\) was in eval"),
}


def test_a_change_of_what_the_criterion_uses_is_an_error():
    model, weight = nn.Linear(4, 3).double(), torch.ones(3).double()
    support = randn(3, 9, 4), torch.randint(0, 3, (3, 9))
    loss = module_loss(model, nn.CrossEntropyLoss(weight=weight))
    for inner in (GradientDescent(), HessianFree(steps=1)):
        phi = adapt(loss, dict(model.named_parameters()), support, lam=1.0, warn=False, inner=inner)
        weight[0] += 1
        with pytest.raises(RuntimeError, match="weight, which the loss uses, was modified"):
            phi["bias"].sum().backward()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["module_loss", "function", "external"])
def test_a_change_between_adapt_and_backward_is_an_error(change, kind):
    model, params = frozen_below()
    support, query = data(), data()
    loss = module_loss(model, squared)
    if kind == "function":
        loss = lambda p, d: squared(functional_call(model, p, (d[0],)), d[1])  # noqa: E731
    settings = {"inner": External(lambda problem: problem.start())} if kind == "external" else {}
    phi = adapt(loss, params, support, lam=1.0, warn=False, **settings)
    value = vmap(loss)(phi, query).mean()
    before = torch.autograd.grad(value, list(params.values()), retain_graph=True)
    model(query[0][0])  # reading is not a change
    again = torch.autograd.grad(value, list(params.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    with torch.no_grad():
        CHANGES[change][0](model, support)
    message = CHANGES[change][1]
    with pytest.raises(RuntimeError, match=message):
        value.backward()


def forward_of(net):
    def forward(params, x):
        return functional_call(net, params, (x,))

    return forward


def test_a_change_of_mode_is_seen_through_a_helper_function():
    model, params = frozen_below()
    forward = forward_of(model)
    phi = adapt(lambda p, d: squared(forward(p, d[0]), d[1]), params, data(), lam=1.0, warn=False)
    model.train()
    with pytest.raises(
        RuntimeError, match=r"forward.*1 \(Dropout\) was in eval|Dropout.*was in ev"
    ):
        phi["4.bias"].sum().backward()


SCALE = torch.ones(3, dtype=torch.float64)


def rescaled(p, d):
    return SCALE[0] * fit(p, d)


def replace_weight(model):
    model[0].weight = nn.Parameter(torch.zeros(8, 4).double(), requires_grad=False)


def load_by_assignment(model):
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(copies, assign=True)


@pytest.mark.parametrize("replace", [replace_weight, load_by_assignment])
def test_a_replaced_parameter_is_an_error(replace):
    model, params = frozen_below()
    phi = adapt(module_loss(model, squared), params, data(), lam=1.0, warn=False)
    replace(model)
    with pytest.raises(RuntimeError, match=r"0\.weight, which the loss uses, was replaced"):
        phi["4.bias"].sum().backward()


def test_a_replaced_variable_is_an_error(monkeypatch):
    phi = adapt(rescaled, learned(), data(), lam=1.0, warn=False)
    monkeypatch.setitem(globals(), "SCALE", 2 * SCALE)
    with pytest.raises(RuntimeError, match="SCALE, which the loss uses, was replaced"):
        phi["w"].sum().backward()


def test_one_of_several_captured_tensors_may_be_used():
    first, others = torch.ones(4).double(), [torch.zeros(4).double(), torch.zeros(4).double()]
    pair = [first, *others]
    phi = adapt(
        lambda p, d: fit(p, d) + (pair[0] * p["w"]).sum(), learned(), data(), lam=LAM, **EXACT
    )
    phi["w"].sum().backward()
    model = nn.Linear(4, 3).double().requires_grad_(False)
    loss = module_loss(model, nn.CrossEntropyLoss(weight=torch.ones(3).double()))
    bias = {"bias": model.bias.requires_grad_()}
    support = randn(3, 9, 4), torch.randint(0, 3, (3, 9))
    adapt(loss, bias, support, lam=1.0, warn=False)["bias"].sum().backward()
    assert model.bias.grad.norm() > 0


def test_steps_on_the_adapted_parameters_and_on_an_unused_mode_are_no_errors():
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.0)).double()
    params, loss = dict(model.named_parameters()), module_loss(model[:1], squared)
    x, y = data()
    expected = adapt(loss, params, (x, y), lam=LAM, **EXACT)
    (want,) = torch.autograd.grad(vmap(loss)(expected, (x, y)).mean(), model[0].weight)
    value = vmap(loss)(adapt(loss, params, (x, y), lam=LAM, **EXACT), (x, y)).mean()
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    model.eval()
    (got,) = torch.autograd.grad(value, model[0].weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("call", [adapt, lambda *a, **k: implicit_meta_grad(*a, a[-1], **k)])
def test_a_loss_that_modifies_its_data_in_place_is_rejected(call):
    def normalising(p, d):
        x, y = d
        x /= 255
        return fit(p, (x, y))

    with pytest.raises(ValueError, match=r"the loss modifies support \(tensor 0\) in place"):
        call(normalising, learned(), data(), lam=LAM)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 1)).double()
    loss, params = module_loss(model, squared), dict(model.named_parameters())
    for inner in (GradientDescent(), HessianFree(steps=1)):
        with pytest.raises(ValueError, match=r"the loss modifies support \(tensor 0\) in place"):
            call(loss, params, data(), lam=LAM, inner=inner)


def test_a_loss_that_modifies_what_it_captures_is_rejected():
    mean = torch.zeros(4).double()

    def averaging(p, d):
        mean.mul_(0.9)
        return fit(p, d) + (mean * p["w"]).sum()

    with pytest.raises(ValueError, match="the loss modifies mean in place"):
        adapt(averaging, learned(), data(), lam=LAM)


def test_a_change_of_what_the_loss_does_not_use_is_no_error():
    model, _ = frozen_below()
    head = model[4]

    def loss(p, d):
        return squared(functional_call(head, p, (d[0],)), d[1])

    (x, y), (qx, qy) = data(features=8), data()
    phi = adapt(loss, dict(head.named_parameters()), (x, y), lam=1.0, warn=False)
    features = model[3].train()(model[0](qx).flatten(0, 1)).unflatten(0, (3, 9))  # running mean
    vmap(loss)(phi, (features, qy)).mean().backward()
    assert head.weight.grad.norm() > 0
