"""Functions that vmap cannot batch have the derivatives that PyTorch gives for one task alone."""

import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from imaml_ext import FOMAML, TaskBatch, adapt, implicit_meta_grad, module_loss
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective

TASKS = 3


@pytest.fixture(params=["torch", ""], autouse=True)
def layers(request, monkeypatch):
    """Without this package's layers, as on other devices, and with those of the CPU."""
    monkeypatch.setenv("IMAML_LAYERS", request.param)


def assert_each_task_agrees(loss, params, data):
    """Losses, gradients and Hessian products are those of torch for each task."""
    layout = Layout(params)
    rows, vector = (torch.randn(TASKS, layout.dim).double() for _ in "rv")
    at = Objective(loss, layout, data).linearise(rows, "hessian")
    product = at.matvec(vector)
    for task in range(TASKS):
        one = tuple(t[task] for t in data)
        flat_loss = lambda row, one=one: loss(layout.unflatten(row), one)  # noqa: E731
        row = rows[task].clone().requires_grad_()
        want = flat_loss(row)
        tolerance = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(at.losses[task], want.detach(), **tolerance)
        torch.testing.assert_close(
            at.gradient[task], torch.autograd.grad(want, row)[0], **tolerance
        )
        torch.testing.assert_close(
            product[task], hessian(flat_loss, row) @ vector[task], **tolerance
        )


def parameters(classes=4):
    return {"w": torch.zeros(classes, 3).double(), "b": torch.zeros(classes).double()}


def linear(params, x):
    return (x @ params["w"].T + params["b"]).tanh()


EMBEDDINGS = {
    "module": lambda ids, weight: torch.func.functional_call(PADDED, {"weight": weight}, (ids,)),
    "functional": lambda ids, weight: F.embedding(ids, weight, padding_idx=2),
    "negative": lambda ids, weight: F.embedding(ids, weight, padding_idx=-2),
    "aten": lambda ids, weight: torch.embedding(weight, ids, 2),
    "sparse": lambda ids, weight: F.embedding(ids, weight, padding_idx=2, sparse=False),
}
PADDED = nn.Embedding(4, 3, padding_idx=2)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_padding_row_of_an_embedding_is_constant_in_every_task(name):
    ids = torch.randint(4, (TASKS, 6, 2))
    ids[:, 0] = 2

    def loss(params, data):
        rows = EMBEDDINGS[name](data[0], params["w"])
        return (rows.sin().sum(1) * params["b"][:3]).square().sum()

    assert_each_task_agrees(loss, parameters(), (ids,))
    layout, rows = Layout(parameters()), torch.randn(TASKS, 16).double()
    at = Objective(loss, layout, (ids,)).linearise(rows, "hessian")
    for flat in (at.gradient, at.matvec(torch.ones_like(rows))):
        table = layout.unflatten(flat)["w"]
        assert (table[:, 2] == 0).all()
        assert (table != 0).any(dim=(1, 2)).all()


def test_a_padding_row_is_constant_where_ids_or_weights_are_common_to_all_tasks():
    ids, common = torch.tensor([0, 2, 2, 1]), torch.randn(4, 3).double()

    def loss(params, data):
        own = F.embedding(ids, params["w"], padding_idx=2)
        return (own * F.embedding(data[0], common, padding_idx=2)).square().sum()

    assert_each_task_agrees(loss, parameters(), (torch.randint(4, (TASKS, 4)),))


def test_gradients_by_a_sparse_embedding_are_those_of_a_dense_one():
    ids, y = torch.randint(4, (2, TASKS, 6, 2)), torch.randn(2, TASKS, 6, 2, 3)
    out = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(4, 3, sparse=sparse)
        loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
        out.append(implicit_meta_grad(loss, params, (ids[0], y[0]), (ids[1], y[1]), lam=1.0))
    assert torch.equal(out[0].params["weight"], out[1].params["weight"])


def padded_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(6, 1))


def test_a_padding_row_is_neither_adapted_nor_learned():
    model = padded_model()
    ids, y = torch.randint(5, (TASKS, 4, 3)), torch.ones(TASKS, 4, 1)
    ids[:, :2] = 0
    loss, params = module_loss(model, F.mse_loss), dict(model.named_parameters())
    out = implicit_meta_grad(loss, params, (ids, y), (ids, y), lam=1.0)
    assert (out.adapted["0.weight"][:, 0] == 0).all()
    assert (out.params["0.weight"][0] == 0).all()
    assert (out.params["0.weight"] != 0).any()
    # The query loss under the caller's vmap, outside of the package.
    phi = adapt(loss, params, (ids, y), lam=1.0)
    torch.func.vmap(loss)(phi, (ids, y)).mean().backward()
    for name, parameter in params.items():
        torch.testing.assert_close(parameter.grad, out.params[name])


def test_a_padding_row_of_an_embedding_bag_is_constant_too():
    bag = nn.EmbeddingBag(5, 2, padding_idx=0, mode="sum").double()
    ids, y = torch.randint(5, (TASKS, 4, 3)), torch.ones(TASKS, 4, 2).double()
    ids[:, :, 0] = 0
    loss, params = module_loss(bag, F.mse_loss), dict(bag.named_parameters())
    got = FOMAML(loss, params).meta_gradient(TaskBatch((ids, y), (ids, y))).params["weight"]
    assert (got[0] == 0).all()
    assert (got[1:] != 0).any()


REFUSED = {
    "max_norm": r"^0 \(Embedding\): an embedding with max_norm writes to its weight: construct it",
    "scale_grad_by_freq": r"^0 \(Embedding\): .*scale_grad_by_freq=True is not the derivative",
}


@pytest.mark.parametrize("option", REFUSED)
def test_embeddings_whose_gradient_is_not_that_of_the_loss_are_refused(option):
    model = nn.Sequential(nn.Embedding(5, 2, **{option: 1.0}), nn.Flatten(), nn.Linear(6, 1))
    before = model[0].weight.detach().clone()
    data = torch.randint(5, (TASKS, 4, 3)), torch.ones(TASKS, 4, 1)
    with pytest.raises(ValueError, match=REFUSED[option]) as caught:
        implicit_meta_grad(
            module_loss(model, F.mse_loss), dict(model.named_parameters()), data, data, lam=1.0
        )
    assert "\n" not in str(caught.value)
    assert torch.equal(model[0].weight, before)


def test_the_gradient_with_scale_grad_by_freq_is_not_a_derivative_in_torch():
    # If this fails, PyTorch has changed, and the option may be allowed.
    weight, ids = torch.randn(3, 2).double().requires_grad_(), torch.tensor([1, 1, 0])
    (got,) = torch.autograd.grad(
        F.embedding(ids, weight, scale_grad_by_freq=True).square().sum(), weight
    )
    (want,) = torch.autograd.grad(F.embedding(ids, weight).square().sum(), weight)
    assert torch.equal(got[1], want[1] / 2)


WEIGHTS = torch.tensor([0.3, 2.0, 1.0, 0.7]).double()
ENTROPIES = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "reduction": "sum"},
    {"label_smoothing": 0.3, "reduction": "none"},
    {"label_smoothing": 0.2, "ignore_index": 2},
    {"label_smoothing": 0.2, "ignore_index": 2, "reduction": "none"},
    {"label_smoothing": 0.2, "ignore_index": -1, "reduction": "sum"},
    {"label_smoothing": 0.2, "size_average": False},
    {"label_smoothing": 0.2, "reduce": False},
    {"ignore_index": 2},
]


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("settings", ENTROPIES, ids=str)
def test_cross_entropy_with_class_weights_and_label_smoothing(settings):
    x, y = torch.randn(TASKS, 6, 3).double(), torch.randint(4, (TASKS, 6))
    y[:, 0] = settings.get("ignore_index", 0)

    def loss(params, data):
        z = linear(params, data[0])
        return F.cross_entropy(z, data[1], WEIGHTS, **settings).square().sum()

    assert_each_task_agrees(loss, parameters(), (x, y))


@pytest.mark.parametrize("shape", ["one example", "images", "probabilities"])
def test_cross_entropy_of_other_shapes(shape):
    x, y = torch.randn(TASKS, 6, 3).double(), torch.randint(4, (TASKS, 6))
    if shape == "probabilities":
        y = torch.rand(TASKS, 6, 4).double()

    def loss(params, data):
        z, labels = linear(params, data[0]), data[1]
        if shape == "one example":
            z, labels = z[0], labels[0]
        elif shape == "images":
            z, labels = z.T[None].unflatten(2, (2, 3)), labels.view(1, 2, 3)
        return F.cross_entropy(z, labels, WEIGHTS, label_smoothing=0.1)

    assert_each_task_agrees(loss, parameters(), (x, y))


def variances(kind, z):
    exact = z[:, 2:].exp()
    return {
        "heteroscedastic": exact,
        "one for each example": exact[:, 0],
        "one column": exact[:, :1],
        "clamped": exact,
        "a number": 0.5,
    }[kind]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "kind", ["heteroscedastic", "one for each example", "one column", "clamped", "a number"]
)
def test_gaussian_nll_loss(kind, reduction):
    x, y = torch.randn(TASKS, 6, 3).double(), torch.randn(TASKS, 6, 2).double()

    def loss(params, data):
        z = linear(params, data[0])
        settings = {"eps": 1.0} if kind == "clamped" else {"full": True}
        var = variances(kind, z)
        losses = F.gaussian_nll_loss(z[:, :2], data[1], var, reduction=reduction, **settings)
        return losses.square().sum()

    assert_each_task_agrees(loss, parameters(), (x, y))


def test_a_negative_variance_is_nan_and_a_variance_of_the_wrong_shape_an_error():
    x = torch.randn(TASKS, 6, 3).double()

    def loss(params, data):
        z = linear(params, data[0])
        return F.gaussian_nll_loss(z[:, :2], z[:, 2:], -z[:, 2:].exp())

    layout, rows = Layout(parameters()), torch.randn(TASKS, 16).double()
    assert Objective(loss, layout, (x,)).losses(rows).isnan().all()

    def wrong(params, data):
        z = linear(params, data[0])
        return F.gaussian_nll_loss(z, z, z[:, :2].exp())

    with pytest.raises(ValueError, match="var is of incorrect size"):
        Objective(wrong, layout, (x,)).losses(rows)


def kl(p, q):
    return lambda a, b: D.kl_divergence(p(a), q(b)).sum()


DIVERGENCES = {
    "Categorical": kl(lambda z: D.Categorical(logits=z), lambda z: D.Categorical(logits=z)),
    "OneHot": kl(lambda z: D.OneHotCategorical(z.softmax(-1)),
                 lambda z: D.OneHotCategorical(logits=z)),
    "Bernoulli": kl(lambda z: D.Bernoulli(z.sigmoid()), lambda z: D.Bernoulli(logits=z)),
    "Normal": kl(lambda z: D.Normal(z, 1.0), lambda z: D.Normal(z, z.exp())),
    "Independent": kl(lambda z: D.Independent(D.Normal(z, 1.0), 1),
                      lambda z: D.Independent(D.Normal(z, z.exp()), 1)),
    "Gamma": kl(lambda z: D.Gamma(z.exp(), 1.0), lambda z: D.Gamma(z.exp(), 2.0)),
    "Dirichlet": kl(lambda z: D.Dirichlet(z.exp()), lambda z: D.Dirichlet(z.exp() + 1)),
    "Uniform": kl(lambda z: D.Uniform(z - 1, z + 1), lambda z: D.Uniform(z - 3 + z.sin(), z + 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_of_distributions(name):
    x = torch.randn(TASKS, 6, 3).double()

    def loss(params, data):
        z = linear(params, data[0])
        return DIVERGENCES[name](z.flip(0).cos(), z)

    assert_each_task_agrees(loss, parameters(), (x,))


@pytest.mark.parametrize("value", ["number", "tensor", "of the task"])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_number_may_be_written_where_a_mask_is_true(dims, value):
    x = torch.randn(TASKS, 6, 3).double()

    def loss(params, data):
        z = linear(params, data[0]) * 1.0
        mask = data[0][:, 0] > 0 if dims == 1 else z > 0
        z[mask] = {
            "number": 0.5,
            "tensor": torch.tensor(0.5).double(),
            "of the task": params["b"][0],
        }[value]
        return z.square().sum() + z.sum()

    assert_each_task_agrees(loss, parameters(), (x,))


def test_a_tensor_of_torch_empty_may_be_written_to():
    x = torch.randn(TASKS, 6, 3).double()

    def loss(params, data):
        z = torch.empty(6, 4, dtype=torch.float64)
        for example in range(6):
            z[example] = linear(params, data[0][example])
        return z.square().sum()

    assert_each_task_agrees(loss, parameters(), (x,))


SAMPLED = {
    "Normal": lambda z: D.Normal(z, 1.0),
    "constant": lambda z: D.Normal(torch.zeros(4).double(), 1.0),
    "MultivariateNormal": lambda z: D.MultivariateNormal(z, torch.eye(4).double()),
    "Laplace": lambda z: D.Laplace(z, 1.0),
    "Exponential": lambda z: D.Exponential(z.exp()),
    "Gumbel": lambda z: D.Gumbel(z, 1.0),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_a_distribution_differ_between_tasks(name):
    seen = []

    def loss(params, data):
        sample = SAMPLED[name](params["b"]).rsample()
        seen.append(torch._C._functorch.get_unwrapped(sample).detach())
        return sample.square().sum()

    Objective(loss, Layout(parameters()), (torch.ones(TASKS, 1).double(),)).losses(
        torch.zeros(TASKS, 16).double()
    )
    (samples,) = seen
    assert samples.shape == (TASKS, 4)
    assert (samples[0] != samples[1]).all()


LOSSES = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, nn.MSELoss()]


@pytest.mark.parametrize("criterion", LOSSES)
def test_outputs_and_labels_that_would_be_compared_each_with_each_are_refused(criterion):
    model = nn.Linear(4, 1)
    loss, params = module_loss(model, criterion), dict(model.named_parameters())
    data = torch.randn(TASKS, 6, 4), torch.randn(TASKS, 6)
    message = (
        r"^the criterion: \w+_loss of \[6, 1\] and \[6\] would compare each with each: .* \(in "
        r"criterion\(outputs, y\) with outputs \[6, 1\] float32 and y \[6\] float32 of one task\)$"
    )
    with pytest.raises(ValueError, match=message):
        implicit_meta_grad(loss, params, data, data, lam=1.0)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_against_one_number_is_not_refused():
    x = torch.randn(TASKS, 6, 3).double()
    zero = torch.zeros(()).double()
    assert_each_task_agrees(
        lambda params, data: F.mse_loss(linear(params, data[0]), zero), parameters(), (x,)
    )
