"""Functions of one task as programs: the results are those of PyTorch's operators."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from imaml_ext.programs.operators import UnsupportedOperator
from imaml_ext.programs.task_program import TaskProgram

TASKS = 3


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TASKS, 4, 6, generator=generator, dtype=dtype)
    y = torch.randn(TASKS, 4, 6, generator=generator, dtype=dtype)
    labels = torch.randint(0, 6, (TASKS, 4), generator=generator)
    return x, y, labels


def check(function, *inputs, shared=(), tolerance=1e-12):
    """Compare a program with the function, called for one task at a time."""
    is_shared = [k in shared for k in range(len(inputs))]

    def of_task(i):
        return [t if s else t[i : i + 1] for t, s in zip(inputs, is_shared, strict=True)]

    program = TaskProgram(lambda *one: [function(*one)], of_task(0), is_shared)
    (got,) = program(*inputs)
    want = torch.cat([function(*of_task(i)) for i in range(TASKS)])
    assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)
    return program


FUNCTIONS = {
    "arithmetic": lambda x, y, n: (2 * x - y / 3 + 1) * (x - 2) / (y * y + 1),
    "alpha": lambda x, y, n: torch.add(x, y, alpha=-2.5) + torch.sub(x, y, alpha=0.5),
    "powers": lambda x, y, n: x**2 + x**3 + y.abs() ** 1.5 + y.abs().pow(x),
    "comparisons": lambda x, y, n: torch.where((x > y) & ~(x >= 1) | (y != 0.5), x, y),
    "maximum": lambda x, y, n: torch.maximum(x, y) - torch.minimum(x, 0 * y),
    "clamp": lambda x, y, n: x.clamp(-0.5, 0.7) + y.clamp_min(0.1) + y.clamp(max=0.2),
    "exponentials": lambda x, y, n: x.exp() + (y * y).log1p() + x.expm1() + (y * y + 0.1).log(),
    "roots": lambda x, y, n: x.abs().sqrt() + (y * y + 1).rsqrt() + (x * x + 2).reciprocal(),
    "trigonometry": lambda x, y, n: x.sin() * y.cos() + x.tanh() * y.sigmoid() + x.erf(),
    "signs": lambda x, y, n: x.sign() + x.floor() - y.ceil() + (-y).abs() + x.sgn(),
    "logsumexp": lambda x, y, n: x.logsumexp(-1),
    "softmax": lambda x, y, n: x.softmax(-1) * y.log_softmax(1),
    "sums": lambda x, y, n: x.sum(-1) + y.mean(2) + x.sum((1, 2), keepdim=True)[:, :, 0],
    "outer sum": lambda x, y, n: x.sum(1) - y.mean(1) + x.sum()[None, None],
    "extremes": lambda x, y, n: x.amax(-1) - y.amin(2) + x.amax((1, 2))[:, None],
    "variance": lambda x, y, n: x.var(-1) + y.var(2, correction=0) + x.std(2),
    "products": lambda x, y, n: x @ y.mT,
    "transposed product": lambda x, y, n: x.mT @ y,
    "product of columns": lambda x, y, n: (x.mT @ y)[..., :1] + x.mT @ y[..., :1],
    "product and sum": lambda x, y, n: x @ y.mT + y[..., :4],
    "sum and product": lambda x, y, n: y[:, :, :4].mT + (x @ y.mT).mT,
    "product used twice": lambda x, y, n: (p := x @ y.mT) + x[..., :4] - 2 * p,
    "einsum": lambda x, y, n: torch.einsum("bij,bkj->bki", x, y),
    "linear": lambda x, y, n: F.linear(x[0], y[0, :2], y[0, 0, :2])[None],
    "views": lambda x, y, n: x.view(-1, 24).unflatten(1, (6, 4)).mT[:, 1:3, ::2].flatten(1),
    "permuted": lambda x, y, n: x.permute(0, 2, 1).reshape(-1, 24) + y.reshape(-1, 24),
    "expanded": lambda x, y, n: x[:, :, None].expand(-1, -1, 5, -1).sum(2),
    "squeezed": lambda x, y, n: x[:, 0].unsqueeze(1).squeeze(1) + y[..., 0:1].squeeze(-1).sum(),
    "concatenated": lambda x, y, n: torch.cat([x, y.exp(), x], 2),
    "stacked": lambda x, y, n: torch.stack([x.mT, y.mT + 1], 3).flatten(2),
    "split": lambda x, y, n: sum(part.sum(-1) for part in x.split([1, 2, 3], -1)),
    "chunks": lambda x, y, n: torch.cat(x.chunk(3, -1)[::-1], -1) + y,
    "diagonal": lambda x, y, n: x[..., :4].diagonal(dim1=1, dim2=2),
    "the input": lambda x, y, n: x,
    "a view of the input": lambda x, y, n: x.mT,
    "a constant": lambda x, y, n: torch.ones_like(x) * 3 + torch.full_like(x, 0.1),
    "folded constants": lambda x, y, n: x * (torch.ones_like(x) * 2 / 7) - torch.zeros_like(x),
    "negative zero": lambda x, y, n: (torch.zeros_like(x) * -1).reciprocal(),
    "gather": lambda x, y, n: x.gather(2, n.unsqueeze(-1)).squeeze(-1),
    "scatter": lambda x, y, n: torch.zeros_like(x).scatter(2, n.unsqueeze(-1), 2.0) * y,
    "scatter add": lambda x, y, n: x.scatter_add(2, n.unsqueeze(-1), y) - x,
    "labels": lambda x, y, n: torch.where(n == 2, 1.0, n.to(x.dtype)),
    "counts": lambda x, y, n: (n != 3).sum(1) / x.sum((1, 2)),
    "cross entropy": lambda x, y, n: F.cross_entropy(x.mT, n, reduction="none"),
    "smoothed": lambda x, y, n: F.cross_entropy(x[0], n[0], label_smoothing=0.1)[None],
    "weighted": lambda x, y, n: F.cross_entropy(x[0], n[0], weight=y[0, 0].abs())[None],
    "probabilities": lambda x, y, n: F.cross_entropy(x[0], y[0].softmax(-1))[None],
    "squares": lambda x, y, n: F.mse_loss(x, y, reduction="none").mean((1, 2)),
    "huber": lambda x, y, n: F.huber_loss(x, y, delta=0.5, reduction="none"),
    "logits": lambda x, y, n: F.binary_cross_entropy_with_logits(x, y.sigmoid())[None],
    "gelu": lambda x, y, n: F.gelu(x) + F.gelu(y, approximate="tanh"),
    "silu": lambda x, y, n: F.silu(x) + F.softplus(y) + F.elu(x) + F.mish(y),
    "leaky": lambda x, y, n: F.leaky_relu(x, 0.1) + F.hardtanh(y) + F.relu(x) + F.logsigmoid(y),
    "layer norm": lambda x, y, n: F.layer_norm(x, (6,), y[0, 0], y[0, 1]),
    "group norm": lambda x, y, n: F.group_norm(x, 2),
    "inserted": lambda x, y, n: x.slice_scatter(y[..., :2], 2, 1, 3).select_scatter(y[:, 0], 1, 2),
    "a modified copy": lambda x, y, n: (u := x.exp()).clone().mul_(2) + u + x.exp().neg_() * u,
    "a modified view": lambda x, y, n: (u := x.exp()) * 0 + u.view(-1, 24).add_(1).view_as(x) + u,
    "a sum in place": lambda x, y, n: (
        (t := x.tanh()).pow(3).sum((1, 2))[:, None, None]
        + (s := torch.cat([t, x.sin()], 2))
        + t @ torch.cat([y, y], 2)[:, :1].expand(-1, 6, -1)
        + s * t.sum()
        + (t * t).mean()
    ),
    "a mask of integers": lambda x, y, n: n.bool().to(x.dtype) + (n > 1).to(x.dtype),
    "a transposed gather": lambda x, y, n: x.mT.gather(1, n[:, None]).mT.reshape(-1, 4),
    "a transposed scatter": lambda x, y, n: (
        torch.zeros_like(x).scatter_add(2, n.unsqueeze(-1), y).mT.reshape(-1, 24)
    ),
    "a number": lambda x, y, n: 0.5 * (x * y).mean() + x + 0,
    "no elements": lambda x, y, n: torch.cat([x[:, :0], x, y[:, :0]], 1),
    "in place": lambda x, y, n: torch.empty_like(x).fill_(2.0).sub_(x).mul_(y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_computes_what_pytorch_does(name):
    check(FUNCTIONS[name], *operands())


@pytest.mark.parametrize("name", ["arithmetic", "exponentials", "cross entropy", "layer norm"])
def test_in_float32(name):
    check(FUNCTIONS[name], *operands(torch.float32), tolerance=1e-5)


def gradients(function):
    def differentiated(x, y, n):
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            return torch.cat(torch.autograd.grad(function(x, y, n).square().sum(), (x, y)), 2)

    return differentiated


@pytest.mark.parametrize(
    "name",
    [
        *("arithmetic", "powers", "exponentials", "trigonometry", "softmax", "variance"),
        *("products", "sum and product", "permuted", "concatenated", "gather", "cross entropy"),
        *("smoothed", "gelu", "silu", "leaky", "layer norm", "group norm", "huber"),
    ],
)
def test_a_derivative_is_traced(name):
    def function(x, y, n):
        return FUNCTIONS[name](x, y, n) + 0 * y.sum()

    check(gradients(function), *operands())


def test_nan_and_infinity_propagate_as_in_pytorch():
    x, y, n = operands()
    x[0, 0] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e300])
    y[0, 0, 3:] = torch.tensor([math.nan, math.inf, 0.0])
    for name in ("maximum", "clamp", "comparisons", "signs", "arithmetic", "leaky", "extremes"):
        check(FUNCTIONS[name], x, y, n)


def test_inputs_may_be_strided_and_shared():
    x, y, _ = operands()
    rows = torch.randn(TASKS, 40, dtype=torch.float64)
    weights = rows[:, 3:27].view(TASKS, 4, 6)  # contiguous within a task
    check(lambda x, w: x @ w.mT, x, weights)
    check(lambda x, w: x @ w.mT, x.transpose(1, 2).contiguous().transpose(1, 2), weights)
    check(lambda x, b: x + b, x, y[0], shared=(1,))
    check(lambda x, b: x @ b, x, y[0].mT, shared=(1,))


def test_other_tensors_are_read_at_every_call():
    x, y, _ = operands()
    scale, mask = torch.tensor(2.0, dtype=torch.float64), torch.tensor([True, False] * 3)
    program = check(lambda x, y: torch.where(mask, x * scale, y), x, y)
    scale.fill_(3.0)
    mask.logical_not_()
    assert_close(program(x, y)[0], torch.where(mask, 3 * x, y))
    scale.data = torch.tensor(5.0, dtype=torch.float64)
    assert_close(program(x, y)[0], torch.where(mask, 5 * x, y))


def test_what_does_not_depend_on_a_late_input_is_computed_once():
    x, y, _ = operands()

    def function(x, y):
        hidden = (x @ x.mT).tanh()
        return [hidden.sum((1, 2)), hidden, hidden @ y + x]

    program = TaskProgram(function, [x[:1], y[:1]], [False, False], late=1)
    (total, hidden), product = program.begin(x)
    want = [torch.cat(each) for each in zip(*(function(*p) for p in _tasks(x, y)), strict=True)]
    assert_close([total, hidden, product(y)], want)
    assert_close(product(2 * y), torch.cat([function(a, b)[2] for a, b in _tasks(x, 2 * y)]))
    x.zero_()
    with pytest.raises(RuntimeError, match="has been modified in place"):
        product(y)


def _tasks(*tensors):
    return [[t[i : i + 1] for t in tensors] for i in range(TASKS)]


def test_products_with_a_derivative_of_gather_do_not_accumulate():
    x, y, n = operands()

    def function(x, n, u):
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            value = at.softmax(-1).gather(2, n.unsqueeze(-1)).pow(2).sum()
            (gradient,) = torch.autograd.grad(value, at, create_graph=True)
            return [gradient.detach(), torch.autograd.grad(gradient, at, u)[0]]

    program = TaskProgram(function, [x[:1], n[:1], y[:1]], [False] * 3, late=1)
    _, product = program.begin(x, n)
    for u in (y, 2 * y, y):
        want = torch.cat([function(*one)[1] for one in _tasks(x, n, u)])
        assert_close(product(u), want)


def test_a_result_that_does_not_depend_on_the_late_input():
    x, y, _ = operands()
    program = TaskProgram(
        lambda x, y: [x.sum((1, 2)), torch.zeros_like(x)], [x[:1], y[:1]], [False] * 2, late=1
    )
    _, product = program.begin(x)
    for _ in range(3):
        torch.full((TASKS, 4, 6), 7.0, dtype=torch.float64)  # memory that is used again
        assert_close(product(y), torch.zeros_like(x))


def test_integers_that_float32_cannot_hold_are_refused():
    x, _, n = operands(torch.float32)
    program = TaskProgram(lambda x, n: [(n == 5).to(x.dtype)], [x[:1], n[:1]], [False] * 2)
    n[1, 1] = 2**24 + 1
    with pytest.raises(ValueError, match=r"integers beyond 2\^24, got \d to 16777217"):
        program(x, n)


def test_late_inputs_must_have_as_many_tasks():
    x, y, _ = operands()
    program = TaskProgram(lambda x, y: [x * 2, x * y], [x[:1], y[:1]], [False] * 2, late=1)
    _, product = program.begin(x)
    with pytest.raises(ValueError, match="expected 3 tasks, got 2"):
        product(y[:2])


def test_results_do_not_depend_on_the_number_of_threads():
    x, y, n = (t.repeat(7, *[1] * (t.dim() - 1)) for t in operands(torch.float32))
    program = TaskProgram(
        lambda *one: [gradients(FUNCTIONS["softmax"])(*one)],
        [t[:1] for t in (x, y, n)],
        [False] * 3,
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(program(x, y, n)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("function", "reason"),
    {
        "random": (lambda x: x + torch.rand_like(x), "rand_like"),
        "values": (lambda x: x * float(x.sum()), "float reads the value of a tensor"),
        "other precision": (lambda x: (x.float() * 2).double(), "float32"),
        "sorting": (lambda x: x.sort(-1).values, "sort"),
        "writes the input": (lambda x: x.add_(1), "of an input"),
        "writes a view": (lambda x: _written(x.exp()), "of a view"),
        "integers": (lambda x: x * (x > 0).long().add(1), "of integers"),
        "sums of booleans": (lambda x: ((x > 0) + (x > 1)).double(), "of integers"),
        "bits": (lambda x: x * ((x > 0).long() & (x > 1).long()), "of integers"),
        "rounding": (lambda x: x.long().double(), "a conversion of float to int"),
        "an index": (lambda x: x[:, torch.tensor(1)], "reads the value of a tensor"),
    }.values(),
    ids=lambda value: None,
)
def test_what_cannot_be_recorded_is_refused(function, reason):
    x, _, _ = operands()
    with pytest.raises(UnsupportedOperator, match=reason):
        TaskProgram(lambda x: [function(x)], [x[:1]], [False])


def _written(x):
    x[:, 0].mul_(2.0)
    return x


def test_inputs_of_another_form_are_refused():
    x, _, _ = operands()
    program = TaskProgram(lambda x: [x.exp()], [x[:1]], [False])
    with pytest.raises(
        ValueError, match=r"recorded as \[4, 6\] torch.float64, and is now \[4, 5\]"
    ):
        program(x[..., :5])
    with pytest.raises(ValueError, match=r"is now .* torch.float32"):
        program(x.float())


def test_labels_out_of_range_raise_an_index_error():
    x, y, n = operands()
    program = check(FUNCTIONS["gather"], x, y, n)
    n[1, 2] = 6
    with pytest.raises(IndexError):
        program(x, y, n)
