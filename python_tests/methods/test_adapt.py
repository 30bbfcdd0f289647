"""What `adapt` differentiates by, and what it refuses, against closed forms and plain autograd."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    MINRES,
    ConjugateGradient,
    ConvergenceWarning,
    External,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    TaskBatch,
    adapt,
    implicit_meta_grad,
    module_loss,
)

CG = ConjugateGradient(max_iter=60, rtol=1e-13)
EXACT = {"inner": HessianFree(steps=4, linear=CG, damping=0.0), "linear": CG}
LAM = 0.3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def data(tasks=3, features=4):
    return randn(tasks, 9, features), randn(tasks, 9)


def fit(p, d):
    return (d[0] @ p["w"] - d[1]).square().mean()


def ridge(x, y, theta, lam=LAM, weight=None):
    """The minimum of the weighted mean squared error and the proximal term, in closed form."""
    weighted = 2 / len(y) * (x if weight is None else weight[:, None] * x)
    matrix = weighted.T @ x + lam * torch.eye(x.shape[1]).double()
    return torch.linalg.solve(matrix, weighted.T @ y + lam * theta)


def learned(features=4):
    return {"w": randn(features).requires_grad_()}


def assert_same_gradients(value, exact, tensors):
    got = torch.autograd.grad(value, tensors, retain_graph=True)
    want = torch.autograd.grad(exact, tensors, retain_graph=True)
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


# What enters is differentiated.


def test_features_of_a_body_carry_the_gradient_to_the_body():
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
    theta, (x, y), (qx, qy) = learned(5), data(), data()
    phi = adapt(fit, theta, (body(x), y), lam=LAM, **EXACT)
    value = vmap(fit)(phi, (body(qx), qy)).mean()
    exact = sum(
        (body(c) @ ridge(body(a), b, theta["w"]) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, qx, qy, strict=True)
    )
    assert_same_gradients(value, exact, [theta["w"], *body.parameters()])


def test_inputs_and_labels_may_be_learned():
    theta, (x, y), query = {"w": randn(4)}, data(), data()
    x.requires_grad_()
    y.requires_grad_()
    phi = adapt(lambda p, d: fit(p, (d["x"], d["y"])), theta, {"x": x, "y": y}, lam=LAM, **EXACT)
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(a, b, theta["w"]) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    assert_same_gradients(value, exact, [x, y])


def test_weights_of_examples_may_come_from_a_network():
    network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()).double()
    theta, (x, y), query = learned(), data(), data()
    weight = network(y[..., None].abs())[..., 0]

    def weighted(p, d):
        x, y, w = d
        return (w * (x @ p["w"] - y).square()).mean()

    phi = adapt(weighted, theta, (x, y, weight), lam=LAM, **EXACT)
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(a, b, theta["w"], weight=w) - d).square().mean() / 3
        for a, b, w, c, d in zip(x, y, weight, *query, strict=True)
    )
    assert_same_gradients(value, exact, [theta["w"], *network.parameters()])


def test_one_tensor_may_enter_through_the_data_and_through_shared():
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (x, y), query = data(), data()

    def loss(p, d):
        return fit(p, d) + p["scale"] * p["w"].square().sum()

    phi = adapt(
        loss, {"w": randn(4) * 0}, (scale * x, y), lam=LAM, shared={"scale": scale}, **EXACT
    )
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(scale * a, b, torch.zeros(4).double(), LAM + 2 * scale) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    assert_same_gradients(value, exact, [scale])


def test_only_the_rows_of_a_failed_task_are_nan_in_the_gradient_by_the_data():
    (x, y), theta = data(), learned()
    y[1, 0] = torch.nan
    x.requires_grad_()
    phi = adapt(fit, theta, (x, y), lam=LAM, **EXACT)
    phi["w"].sum().backward()
    assert theta["w"].grad.isnan().all()
    assert x.grad[1].isnan().all()
    assert x.grad[[0, 2]].isfinite().all()
    exact = sum(ridge(x[k], y[k], theta["w"]).sum() for k in (0, 2))
    (want,) = torch.autograd.grad(exact, x)
    torch.testing.assert_close(x.grad[[0, 2]], want[[0, 2]], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["support", "query"])
@pytest.mark.parametrize("form", ["implicit_meta_grad", IMAML, MAML, FOMAML])
def test_data_with_a_graph_are_rejected_where_numbers_are_returned(form, name):
    batch = {"support": data(), "query": data()}
    batch[name][0].requires_grad_()
    call = {
        "implicit_meta_grad": lambda: implicit_meta_grad(fit, learned(), **batch, lam=LAM),
    }.get(form, lambda: form(fit, learned()).meta_gradient(TaskBatch(**batch)))
    with pytest.raises(ValueError, match=rf"{name} \(tensor 0\) requires grad, but only adapt"):
        call()


def test_evaluation_accepts_data_with_a_graph():
    support = data()
    support[0].requires_grad_()
    phi = IMAML(fit, learned()).adapt(support)
    assert not phi["w"].requires_grad


# What enters by the back door is found.


STRENGTH = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def closed_over(p, d):
    return fit(p, d) + STRENGTH * p["w"].square().sum()


def computed_before():
    decay = STRENGTH.exp()
    return lambda p, d: fit(p, d) + decay * p["w"].square().sum()


def with_default(p, d, strength=STRENGTH):
    return fit(p, d) + strength * p["w"].square().sum()


def through_a_helper():
    def penalty(w):
        return STRENGTH * w.square().sum()

    return lambda p, d: fit(p, d) + penalty(p["w"])


class Regularised:
    def __init__(self):
        self.strength = STRENGTH

    def __call__(self, p, d):
        return fit(p, d) + self.strength * p["w"].square().sum()

    def loss(self, p, d):
        return self(p, d)


HIDDEN = {
    "a global": (lambda: closed_over, "STRENGTH"),
    "computed from a leaf": (computed_before, "decay"),
    "an attribute": (Regularised, "strength"),
    "of a method's object": (lambda: Regularised().loss, "strength"),
    "a default": (lambda: with_default, "strength"),
    "used by a helper": (through_a_helper, "STRENGTH"),
    "an argument of a partial": (
        lambda: functools.partial(lambda p, d, s: fit(p, d) + s * p["w"].sum(), s=STRENGTH),
        "s",
    ),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_tensor_that_the_loss_closes_over_is_named(kind):
    loss, name = HIDDEN[kind][0](), HIDDEN[kind][1]
    message = f"the loss depends on {name}, which requires grad, .* pass it in shared="
    with pytest.raises(ValueError, match=message):
        adapt(loss, learned(), data(), lam=LAM)
    for inner in (LBFGS(steps=2), HessianFree(steps=2, linear=ConjugateGradient())):
        with pytest.raises(ValueError, match=message):
            adapt(loss, learned(), data(), lam=LAM, inner=inner)
    with pytest.raises(ValueError, match=message):
        implicit_meta_grad(loss, learned(), data(), data(), lam=LAM)
    with pytest.raises(ValueError, match=message):  # in the query loss alone
        implicit_meta_grad(fit, learned(), data(), data(), lam=LAM, query_loss=loss)
    for method in (MAML, FOMAML):
        with pytest.raises(ValueError, match=message):
            method(loss, learned()).meta_gradient(TaskBatch(data(), data()))
    with torch.no_grad():
        adapt(loss, learned(), data(), lam=LAM)  # nothing is differentiated


def test_a_hidden_tensor_is_found_in_a_graph_too_large_to_be_searched():
    def loss(p, d):
        value = STRENGTH * p["w"].square().sum()
        for _ in range(12_000):
            value = value + 1e-4
        return value

    with pytest.raises(ValueError, match="the loss depends on STRENGTH, which requires grad"):
        implicit_meta_grad(loss, learned(), data(), data(), lam=LAM)


def test_a_body_left_in_the_model_is_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    head = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    loss = module_loss(model, lambda outputs, y: (outputs[:, 0] - y).square().mean())
    message = r"the loss depends on 0\.weight, 0\.bias, which require grad, .* pass them in shared="
    with pytest.raises(ValueError, match=message):
        adapt(loss, head, data(), lam=LAM)
    ggn = ConjugateGradient(curvature="ggn")
    for settings in ({"inner": HessianFree(steps=1)}, {"linear": ggn}):
        with pytest.raises(ValueError, match=message):
            adapt(loss, head, data(), lam=LAM, **settings)
        with pytest.raises(ValueError, match=message):
            implicit_meta_grad(loss, head, data(), data(), lam=LAM, **settings)
    model[0].requires_grad_(False)
    phi = adapt(loss, head, data(), lam=LAM, **EXACT)
    vmap(loss)(phi, data()).mean().backward()
    assert head["2.weight"].grad.norm() > 0


class Scaled(nn.Linear):
    factor = STRENGTH

    def forward(self, x):
        return self.factor * super().forward(x)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.others = nn.Linear(4, 1).double(), [nn.Linear(4, 1).double()]

    def forward(self, x):
        return self.own(x) + self.others[0](x)


@pytest.mark.parametrize(
    ("model", "name"), [(Scaled(4, 1).double(), "factor"), (Listed(), r"others\.weight")]
)
def test_a_tensor_that_is_no_parameter_of_the_model_is_named(model, name):
    with pytest.raises(ValueError, match=f"the loss depends on {name}.*, which require"):
        adapt(module_loss(model, squared), dict(model.named_parameters()), data(), lam=LAM)


@pytest.mark.parametrize("linear", [ConjugateGradient(), ConjugateGradient(curvature="ggn")])
def test_a_tensor_that_the_criterion_closes_over_is_named(linear):
    model = nn.Linear(4, 1).double()
    loss = module_loss(model, lambda outputs, y: STRENGTH * squared(outputs, y))
    with pytest.raises(ValueError, match="the loss depends on STRENGTH, which requires grad"):
        adapt(
            loss, dict(model.named_parameters()), data(), lam=LAM,
            inner=HessianFree(steps=1, linear=linear),
        )  # fmt: skip


def test_a_loss_that_calls_the_model_itself_is_rejected():
    model = nn.Linear(4, 1).double()
    params = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"depends on model\.weight, model\.bias of the model, not"
    ):
        implicit_meta_grad(
            lambda p, d: nn.functional.mse_loss(model(d[0])[:, 0], d[1]) + 0 * p["weight"].sum(),
            params, data(), data(), lam=LAM,
        )  # fmt: skip


@pytest.mark.parametrize("call", [adapt, lambda *a, **k: implicit_meta_grad(*a, a[-1], **k)])
def test_parameters_of_which_only_some_require_grad_are_rejected(call):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    loss = module_loss(model, lambda outputs, y: (outputs[:, 0] - y).square().mean())
    with pytest.raises(ValueError, match=r"params\['0.weight'\] does not require grad, but other"):
        call(loss, dict(model.named_parameters()), data(), lam=LAM)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = model[0].weight.clone()
    call(loss, learned, data(), lam=LAM)
    assert torch.equal(before, model[0].weight)


# Backward sees what forward saw.


def frozen_below():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(8),
                          nn.Linear(8, 1)).double().eval()  # fmt: skip
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    return model, {n: p for n, p in model.named_parameters() if n.startswith("4.")}


def squared(outputs, y):
    return (outputs[:, 0] - y).square().mean()


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


# Second derivatives, and several vectors at once.


def norm_of_ridge(lam, x, y):
    return ridge(x[0], y[0], torch.zeros(4).double(), lam).square().sum()


def norm_of_adapted(lam, x, y):
    theta = {"w": torch.zeros(4).double()}
    return adapt(fit, theta, (x[:1], y[:1]), lam=lam, **EXACT)["w"].square().sum()


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, at: torch.autograd.grad(f(at), at, create_graph=True),
        lambda f, at: f(at).backward(create_graph=True),
        lambda f, at: torch.autograd.functional.hessian(f, at),
        lambda f, at: torch.autograd.functional.hessian(f, at, vectorize=True),
        lambda f, at: torch.autograd.functional.jacobian(f, at, create_graph=True),
        lambda f, at: torch.autograd.functional.hvp(f, at, torch.ones_like(at)),
    ],
    ids=["grad", "backward", "hessian", "vectorised hessian", "jacobian", "hvp"],
)
def test_second_derivatives_are_rejected_on_every_route(differentiate):
    x, y = data()
    at = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="adapt can be differentiated only once") as caught:
        differentiate(lambda lam: norm_of_adapted(lam.exp(), x, y), at)
    assert "\n" not in str(caught.value)


def test_a_jacobian_may_be_computed_for_several_vectors_at_once():
    x, y = data()
    theta = randn(4)

    def ours(theta, x):
        return adapt(fit, {"w": theta}, (x, y), lam=LAM, **EXACT)["w"]

    def exact(theta, x):
        return torch.stack([ridge(a, b, theta) for a, b in zip(x, y, strict=True)])

    want = torch.autograd.functional.jacobian(exact, (theta, x))
    for vectorize in (False, True):
        got = torch.autograd.functional.jacobian(ours, (theta, x), vectorize=vectorize)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    leaf = theta.requires_grad_()
    rows = ours(leaf, x)[1]
    (got,) = torch.autograd.grad(rows, leaf, torch.eye(4).double(), is_grads_batched=True)
    torch.testing.assert_close(got, want[0][1], rtol=1e-8, atol=1e-11)


# Without a proximal term.


def test_without_a_proximal_term_theta_is_the_start_and_has_gradient_0():
    x, y = randn(3, 9, 4), randn(3, 9)
    query = data()
    decay = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    theta = learned()

    def loss(p, d):
        return fit(p, d) + p["decay"] / 2 * p["w"].square().sum()

    settings = {"lam": 0, "shared": {"decay": decay}, **EXACT}
    phi = adapt(loss, theta, (x, y), **settings)
    value = vmap(fit)(phi, query).mean()
    exact = sum(
        (c @ ridge(a, b, torch.zeros(4).double(), decay) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    assert_same_gradients(value, exact, [decay])
    out = implicit_meta_grad(loss, theta, (x, y), query, query_loss=fit, **settings)
    assert (out.params["w"] == 0).all()
    assert out.lam is None
    (want,) = torch.autograd.grad(exact, decay)
    torch.testing.assert_close(out.shared["decay"], want, rtol=1e-8, atol=1e-11)
    assert (out.linear.lanczos.smallest > 0.19).all()
    with torch.no_grad():
        other = adapt(loss, {"w": theta["w"] + 1}, (x, y), **settings)
    torch.testing.assert_close(other["w"], phi["w"].detach())


def test_the_gradient_by_a_lam_of_0_is_the_one_sided_derivative():
    (x, y), query = data(), data()
    lam = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    theta = learned()
    phi = adapt(fit, theta, (x, y), lam=lam, **EXACT)
    exact = sum(
        (c @ ridge(a, b, theta["w"], lam) - d).square().mean() / 3
        for a, b, c, d in zip(x, y, *query, strict=True)
    )
    (got,) = torch.autograd.grad(vmap(fit)(phi, query).mean(), lam)
    (want,) = torch.autograd.grad(exact, lam)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize("linear", [CG, NeumannSeries(max_iter=9), MINRES(max_iter=9)])
def test_a_hessian_that_is_not_positive_definite_is_reported_without_a_proximal_term(linear):
    def saddle(p, d):
        return (torch.tensor([1.0, -1.0]).double() * p["w"].square()).sum() * d.mean()

    ones, at = torch.ones(2, 1).double(), {"w": torch.zeros(2, 2).double()}
    theta = {"w": torch.zeros(2).double()}
    out = implicit_meta_grad(
        saddle, theta, ones, ones, lam=0, linear=linear, adapted=at,
        query_loss=lambda p, d: p["w"][1] * d.mean(),
    )  # fmt: skip
    if not isinstance(linear, MINRES):
        assert "NEGATIVE_CURVATURE: 2 of 2 tasks" in out.linear.describe()
    if out.linear.lanczos is not None:
        assert (out.linear.error_estimate == torch.inf).all()


def test_imaml_without_a_proximal_term_needs_something_to_learn():
    with pytest.raises(ValueError, match="with lam=0 theta has no gradient"):
        IMAML(fit, learned(), lam=0)


# Negative curvature at once.


@pytest.mark.parametrize("lam", [0.1, 1e-4, 1e-12])
@pytest.mark.parametrize("linear", [CG, NeumannSeries(max_iter=9)])
def test_at_negative_curvature_the_gradients_are_those_of_first_order_methods(lam, linear):
    # Concave at 0.3. First-order methods take phi - theta as a constant.
    at, scale = torch.tensor([[0.3]]).double(), torch.tensor(1.0).double()
    strength = torch.tensor(lam).double()

    def concave(p, d):
        return torch.cos(p["x"]).sum() * p["s"] + 0 * d.sum()

    def query_loss(p, d):
        return (p["x"] - 1).square().sum() + 3 * p["s"] + 0 * d.sum()

    zero = torch.zeros(1, 1).double()
    out = implicit_meta_grad(
        concave, {"x": torch.tensor([0.2]).double()}, zero, zero, lam=strength, linear=linear,
        adapted={"x": at}, query_loss=query_loss, shared={"s": scale},
    )  # fmt: skip
    assert "NEGATIVE_CURVATURE" in out.linear.describe()
    torch.testing.assert_close(out.params["x"], 2 * (at[0] - 1))
    torch.testing.assert_close(out.shared["s"], torch.tensor(3.0).double())
    assert out.lam == 0


# Convergence.


def test_adapt_warns_if_its_gradient_is_inaccurate():
    (x, y), query = data(), data()
    theta = learned()

    def warned(**settings):
        phi = adapt(fit, theta, (x, y), lam=0.05, **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vmap(fit)(phi, query).mean().backward()
        assert all(each.category is ConvergenceWarning for each in caught)
        assert all(each.filename == __file__ for each in caught)
        return [str(each.message) for each in caught]

    (message,) = warned()
    assert "adapt has not converged: it is off by an estimated" in message
    assert "take more steps of the inner solver" in message
    for linear in (ConjugateGradient(max_iter=1), NeumannSeries(max_iter=2)):
        (message,) = warned(inner=EXACT["inner"], linear=linear)
        assert "the linear solve of adapt has not converged" in message
        assert "raise max_iter" in message
    assert warned(warn=False) == []
    assert warned(**EXACT) == []
    assert warned(inner=EXACT["inner"], linear=NeumannSeries(max_iter=500)) == []


def test_without_a_warning_phi_is_accurate():
    silent, loud = 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        (x, y), theta = data(), learned()
        inner = GradientDescent(lr=0.1, steps=int(torch.randint(1, 40, ())))
        phi = adapt(fit, theta, (x, y), lam=LAM, inner=inner)["w"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            phi.sum().backward()
        exact = torch.stack([ridge(a, b, theta["w"]) for a, b in zip(x, y, strict=True)])
        error = (phi - exact).norm() / (phi - theta["w"]).norm()
        assert error > 0.03 if caught else error < 0.15
        silent, loud = silent + (not caught), loud + bool(caught)
    assert silent > 10
    assert loud > 10


def test_the_curvature_of_a_long_linear_solve_is_estimated_from_its_beginning():
    x, y = randn(2, 200, 100), randn(2, 200)
    long = ConjugateGradient(max_iter=150, rtol=1e-12)
    phi = adapt(
        fit, {"w": randn(100)}, (x.requires_grad_(), y), lam=1e-3,
        inner=HessianFree(steps=2, linear=long, damping=0.0), linear=long,
    )  # fmt: skip
    phi["w"].sum().backward()  # warnings are errors
    assert x.grad.norm() > 0


def test_a_task_without_a_query_gradient_does_not_hide_the_others():
    (x, y), theta = data(), learned()
    phi = adapt(fit, theta, (x, y), lam=1e-3)
    with pytest.warns(ConvergenceWarning):
        phi["w"][1].sum().backward()  # v = 0 for the others


def test_a_saddle_point_in_one_task_does_not_hide_the_warning():
    def loss(p, d):
        return d[0] * p["w"].square().sum() / 2

    curvature, theta = torch.tensor([[1.0], [-3.0], [2.0]]).double(), torch.zeros(2).double()
    phi = adapt(loss, {"w": theta.requires_grad_()}, curvature, lam=0.5)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        phi["w"].sum().backward()


def test_an_unsolved_inner_problem_is_reported_with_a_neumann_series():
    phi = adapt(
        fit, learned(), data(), lam=LAM,
        inner=GradientDescent(lr=1e-3, steps=2), linear=NeumannSeries(max_iter=2000),
    )  # fmt: skip
    with pytest.warns(ConvergenceWarning, match="adapt has not converged"):
        phi["w"].sum().backward()


def test_minres_at_a_saddle_point_is_no_reason_for_a_warning():
    curvature = torch.tensor([3.0, -2.0, 1.0, 5.0]).double()

    def saddle(p, d):
        return (curvature * p["w"].square()).sum() / 2 - (d * p["w"]).sum()

    b, theta = randn(3, 4), {"w": torch.zeros(4).double().requires_grad_()}
    stationary = External(lambda problem: b / (curvature + 0.5))
    phi = adapt(saddle, theta, b, lam=0.5, inner=stationary, linear=MINRES(max_iter=9, rtol=1e-12))
    phi["w"].sum().backward()  # warnings are errors
    torch.testing.assert_close(theta["w"].grad, 3 * 0.5 / (curvature + 0.5))


def test_tasks_at_their_optimum_are_no_reason_for_a_warning_in_float32():
    x, theta = torch.randn(3, 30, 10) * torch.logspace(0, -2, 10), torch.randn(10)
    theta.requires_grad_()
    with torch.no_grad():
        y = x @ theta
    cg = ConjugateGradient(max_iter=40)
    phi = adapt(
        fit, {"w": theta}, (x, y), lam=1e-3,
        inner=HessianFree(steps=1, linear=cg, damping=0.0), linear=cg,
    )  # fmt: skip
    phi["w"].sum().backward()


def test_a_shared_name_that_no_loss_can_use_is_rejected():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    head = {n: p for n, p in model.named_parameters() if n.startswith("1.")}
    loss = module_loss(model, squared)
    with pytest.raises(ValueError, match=r"shared\['body.weight'\] is used by no loss"):
        adapt(loss, head, data(), lam=LAM, shared={"body.weight": model[0].weight})
