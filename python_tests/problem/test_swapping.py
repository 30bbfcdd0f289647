"""A model has other parameters while a loss is computed, and is left as it was."""

import copy
import pickle
import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils.parametrizations import orthogonal
from torch.overrides import TorchFunctionMode

from imaml_ext import LBFGS, ConjugateGradient, HessianFree, implicit_meta_grad, module_loss


def meta_gradient(model, criterion=F.mse_loss, outputs=4, **settings):
    x, y = torch.randn(2, 8, 4), torch.randn(2, 8, outputs)
    params = dict(model.named_parameters())
    return implicit_meta_grad(module_loss(model, criterion), params, (x, y), (x, y), lam=1.0,
                              **settings)  # fmt: skip


def snapshot(model):
    """Every parameter and buffer by its identity, under all of its names, and their values."""
    entries = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return [(name, id(t), type(t), t.detach().clone()) for name, t in entries]


def assert_unchanged(model, before):
    after = snapshot(model)
    assert [entry[:3] for entry in after] == [entry[:3] for entry in before]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(after, before, strict=True))
    with torch.no_grad():
        assert model(torch.randn(8, 4)).isfinite().all()
    state = copy.deepcopy(model).state_dict()
    torch.testing.assert_close(state, model.state_dict(), rtol=0, atol=0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second = self.first
        self.third = nn.Linear(4, 4)
        self.third.bias = self.first[0].bias
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return self.third(self.second(self.first(x))) * self.scale


def test_a_module_registered_twice_is_left_as_it_was():
    model = Twice()
    before = snapshot(model)
    meta_gradient(model)
    assert_unchanged(model, before)


def test_a_module_registered_twice_has_the_gradient_of_its_formula():
    model = Twice().double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, 4).double()
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    w, b, v = params["first.0.weight"], params["first.0.bias"], params["third.weight"]
    want = ((((x @ w.T + b).tanh() @ w.T + b).tanh() @ v.T + b) - y).square().mean()
    want_gradients = torch.autograd.grad(want, [w, b, v])
    for names in (
        ("first.0.weight", "first.0.bias", "third.weight"),
        ("second.0.weight", "third.bias", "third.weight"),
    ):
        given = {n: p.detach().requires_grad_() for n, p in zip(names, (w, b, v), strict=True)}
        got = module_loss(model, F.mse_loss)(given, (x, y))
        torch.testing.assert_close(got, want)
        gradients = torch.autograd.grad(got, list(given.values()))
        torch.testing.assert_close(gradients, want_gradients)


@pytest.mark.parametrize("where", ["forward", "criterion"])
def test_a_model_is_left_as_it_was_after_an_error(where):
    model = Keeping("attribute")
    before = snapshot(model)

    def fail(*arguments):
        raise ArithmeticError("broken")

    criterion = F.mse_loss
    if where == "forward":
        model.after = fail
    else:
        criterion = fail
    with pytest.raises(ArithmeticError, match="broken"):
        meta_gradient(model, criterion)
    assert model.last is None
    model.after, model.how = None, "nothing"
    assert_unchanged(model, before)


def test_a_penalty_in_the_criterion_is_on_the_adapted_parameters():
    """Against the closed form of ridge regression, X'X / n + (w + lam) I."""
    model, weight, lam = nn.Linear(4, 1, bias=False).double(), 0.7, 0.3

    def criterion(outputs, y):
        return F.mse_loss(outputs, y) / 2 + weight / 2 * sum(
            p.square().sum() for p in model.parameters()
        )

    (x, y), (u, t) = ((torch.randn(2, 9, 4).double(), torch.randn(2, 9, 1).double()) for _ in "sq")
    theta = model.weight.detach().clone()
    out = implicit_meta_grad(
        module_loss(model, criterion), {"weight": theta}, (x, y), (u, t), lam=lam,
        inner=LBFGS(steps=40), linear=ConjugateGradient(max_iter=40, rtol=1e-13),
    )  # fmt: skip
    eye = torch.eye(4).double()
    matrix = x.mT @ x / 9 + (weight + lam) * eye
    phi = torch.linalg.solve(matrix, x.mT @ y / 9 + lam * theta.T)
    v = (u.mT @ u / 9 + weight * eye) @ phi - u.mT @ t / 9
    want = lam * torch.linalg.solve(matrix, v).mean(0)
    torch.testing.assert_close(out.adapted["weight"], phi.mT, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(out.params["weight"], want.mT, rtol=1e-7, atol=1e-9)


class Keeping(nn.Module):
    """Keeps its activation, and counts its calls."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.how, self.calls, self.after = how, 0, None
        self.last = self.kept = None
        self.list, self.queue, self.set = [0, 1], deque([0], maxlen=2), {0}
        self.dict = {"calls": 0, "last": 0, "nested": [0]}
        self.object = SimpleNamespace(calls=0, last=0)

    def forward(self, x):
        h = self.linear(x)
        self.calls += 1
        self.dict["calls"] += 1
        self.object.calls += 1
        if self.how == "attribute":
            self.last = h
        elif self.how == "new attribute":
            self.__dict__["surprise"] = {"here": (h, 1)}
        elif self.how == "new object":
            self.last = SimpleNamespace(h=h)
        elif self.how == "parameter":
            self.last = self.linear.weight
        elif self.how == "entry of a list":
            self.list[1] = h
        elif self.how == "appended":
            self.list.append(h)
            self.queue.extend([h, h])
            self.set.add(h)
        elif self.how == "entry of a dict":
            self.dict["last"] = self.dict["new"] = h
        elif self.how == "nested":
            self.dict["nested"].append([h])
        elif self.how == "object":
            self.object.last = h
        elif self.how == "submodule":
            self.linear.last = h
        elif self.how == "buffer":
            self.register_buffer("seen", h.sum(), persistent=False)
        if self.after is not None:
            self.after(h)
        return h


HOW = [
    "attribute", "new attribute", "new object", "parameter", "entry of a list", "appended",
    "entry of a dict", "nested", "object", "submodule", "buffer",
]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_tensors_of_a_task_do_not_stay_in_the_model_and_counters_do(how):
    model = Keeping(how)
    before = snapshot(model)
    meta_gradient(model)
    assert model.calls == model.dict["calls"] == model.object.calls > 0
    assert model.last is None
    assert not hasattr(model, "surprise")
    assert not hasattr(model, "seen")
    assert not hasattr(model.linear, "last")
    assert (model.list, list(model.queue), model.set) == ([0, 1], [0], {0})
    assert model.dict == {"calls": model.calls, "last": 0, "nested": [0]}
    assert model.object.last == 0
    model.how = "nothing"
    assert_unchanged(model, before)


def test_a_parameter_that_is_passed_does_not_stay_in_the_model():
    model = Keeping("parameter")
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    module_loss(model, F.mse_loss)(params, (torch.randn(5, 4),) * 2)
    assert model.last is None


def test_a_criterion_does_not_keep_tensors_of_a_task_either():
    class Criterion(nn.Module):
        last = None

        def forward(self, outputs, y):
            self.last = (outputs - y).square().mean()
            return self.last

    criterion = Criterion()
    meta_gradient(nn.Linear(4, 4), criterion)
    is_restored = criterion.last is None  # pytest could not print a tensor of vmap
    assert is_restored


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_computed_by_a_hook_is_restored():
    layer = weight_norm(nn.Linear(4, 4))
    kept = layer.weight
    loss = module_loss(layer, F.mse_loss)
    x = torch.randn(2, 3, 4)
    torch.func.vmap(loss)({n: torch.randn(2, *p.shape) for n, p in layer.named_parameters()},
                          (x, x))  # fmt: skip
    is_restored = layer.weight is kept
    assert is_restored


def test_two_values_of_a_tied_parameter_are_refused():
    model = Twice()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    params["third.bias"] = params["first.0.bias"] + 1
    with pytest.raises(ValueError, match=r"^params\['third.bias'\] is tied to another of \["):
        module_loss(model, F.mse_loss)(params, (torch.randn(5, 4),) * 2)


def test_buffers_may_be_passed_by_name():
    model = Twice().double()
    x = torch.randn(5, 4).double()
    scale = torch.rand(4).double()
    got = module_loss(model, F.mse_loss).outputs({"scale": scale}, x)
    torch.testing.assert_close(got, model(x) * scale)
    assert torch.equal(model.scale, torch.ones(4).double())


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_t, self.bias = (nn.Parameter(torch.zeros(n).double()) for n in ((), (4,)))

    def forward(self, outputs, y):
        return F.cross_entropy((outputs + self.bias) * self.log_t.exp(), y)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_shared_parameters_of_a_criterion_have_the_gradient_of_a_finite_difference(curvature):
    model, criterion = nn.Linear(3, 4).double(), Temperature()
    x, y = torch.randn(2, 6, 3).double(), torch.randint(4, (2, 6))
    cg = ConjugateGradient(max_iter=60, rtol=1e-12, curvature=curvature)  # of a linear model: equal
    settings = {"inner": HessianFree(steps=20, linear=cg, damping=0.0, tol=1e-12), "linear": cg}

    def result(log_t, bias):
        return implicit_meta_grad(
            module_loss(model, criterion),
            dict(model.named_parameters()),
            (x, y),
            (x + 1, y),
            lam=0.5,
            # "bias" is the model's.
            shared={"log_t": log_t, "criterion.bias": bias},
            **settings,
        )

    at, step = (criterion.log_t.detach() + 0.2, torch.randn(4).double()), 1e-5
    got = result(*at).shared
    for name, direction in {"log_t": (1, 0), "criterion.bias": (0, torch.eye(4)[1])}.items():
        up, down = (
            result(*(a + sign * step * d for a, d in zip(at, direction, strict=True)))
            for sign in (1, -1)
        )
        want = (up.query_loss.mean() - down.query_loss.mean()) / (2 * step)
        torch.testing.assert_close(got[name].flatten()[-3 if got[name].dim() else 0], want,
                                   rtol=1e-6, atol=1e-8)  # fmt: skip
    assert criterion.log_t == 0


def test_a_cache_of_parametrized_weights_around_a_loss_has_no_effect():
    model = nn.Sequential(orthogonal(nn.Linear(4, 4)), nn.Linear(4, 1)).double()
    names = dict(model.named_parameters())
    params = {n: torch.randn_like(p) for n, p in names.items()}
    x, y = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 1).double()
    loss = module_loss(model, F.mse_loss)

    def plain(params, data):
        return F.mse_loss(functional_call(model, params, (data[0],)), data[1])

    def values():
        yield loss(params, (x[0], y[0]))
        for each in (loss, plain):
            yield implicit_meta_grad(each, params, (x, y), (x, y), lam=1.0).query_loss

    want = list(values())
    with parametrize.cached():
        before = model[0].weight
        got = list(values())
        assert model[0].weight is before  # the cache is in use again
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert parametrize._cache == {}


@pytest.mark.parametrize("is_shared", [False, True])
def test_threads_with_one_model_or_layer_wait_for_each_other(is_shared):
    model = nn.Linear(4, 1).double()
    other = nn.Sequential(nn.Identity(), model) if is_shared else model
    prefix = "1." if is_shared else ""
    inside, may_leave, order = threading.Event(), threading.Event(), []

    def criterion(outputs, y):
        order.append("first")
        inside.set()
        may_leave.wait(10)
        order.append("first")
        return (outputs - y).square().mean()

    def second(outputs, y):
        order.append("second")
        return (outputs - y).square().mean()

    x, y = torch.randn(5, 4).double(), torch.randn(5, 1).double()
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    want = (x @ params["weight"].T + params["bias"] - y).square().mean()
    got = []
    threads = [
        threading.Thread(target=lambda loss=loss, p=p: got.append(loss(p, (x, y))))
        for loss, p in (
            (module_loss(model, criterion), params),
            (module_loss(other, second), {prefix + name: t for name, t in params.items()}),
        )
    ]
    own = dict(model.named_parameters())
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    may_leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "first", "second"]
    torch.testing.assert_close(got, [want, want])
    assert all(p is own[n] for n, p in model.named_parameters())


def test_a_loss_may_call_itself_and_be_copied():
    model = nn.Linear(4, 4).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    simple = module_loss(model, F.mse_loss)
    twice = module_loss(model, lambda o, y: F.mse_loss(o, y) + simple(params, (x, y)))
    torch.testing.assert_close(twice(params, (x, y)), 2 * simple(params, (x, y)))
    for copied in (copy.deepcopy(simple), pickle.loads(pickle.dumps(simple))):
        assert torch.equal(copied(params, (x, y)), simple(params, (x, y)))


def test_a_loss_uses_no_parameter_that_it_replaces_nor_a_buffer_that_it_does_not_read():
    model = nn.Linear(4, 4)
    model.register_buffer("count", torch.zeros(()))
    seen = []

    class Recording(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.extend(args)
            return function(*args, **(kwargs or {}))

    own = (*model.parameters(), model.count)
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with Recording():
        module_loss(model, F.mse_loss)(params, (torch.randn(5, 4),) * 2)
    assert any(each is params["weight"] for each in seen)
    assert not any(each is tensor for each in seen for tensor in own)
