"""Λ in every form against the dense matrix that it represents."""

import pytest
import torch

from imaml_ext import conjugate_gradient
from imaml_ext.problem.lam import (
    ProximalStrength,
    flatten_lam,
    lam_of_rows,
    unflatten_lam_gradient,
)
from imaml_ext.problem.lam_operator import LamOperator
from imaml_ext.problem.layout import Layout

PARAMS = {"w": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
LAYOUT = Layout(PARAMS)  # D = 7


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def dense():
    root = torch.randn(7, 7, dtype=torch.float64)
    return root @ root.T + torch.eye(7, dtype=torch.float64)


VALUES = {
    "scalar": lambda: tensor([0.7]),
    "diagonal": lambda: torch.rand(7, dtype=torch.float64) + 0.5,
    "dense": dense,
    "scalar per task": lambda: torch.rand(3, 1, 1, dtype=torch.float64) + 0.5,
    "diagonal per task": lambda: torch.rand(3, 1, 7, dtype=torch.float64) + 0.5,
}


def matrix(values):
    return values if values.dim() == 2 else torch.diag(values.expand(7))


def matrices(values):
    """Those of 3 tasks, [3, 7, 7]."""
    if values.dim() == 3:
        return torch.stack([matrix(values[task, 0]) for task in range(3)])
    return matrix(values).expand(3, 7, 7)


def product(rows, values):
    return torch.einsum("bij,bj->bi", matrices(values), rows)


@pytest.fixture(params=list(VALUES))
def values(request):
    return VALUES[request.param]()


def test_mv_multiplies_each_row_by_the_matrix(values):
    rows = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(LamOperator.of(values).mv(rows), product(rows, values))


def test_solve_inverts_mv(values):
    rows = torch.randn(3, 7, dtype=torch.float64)
    want = torch.linalg.solve(matrices(values), rows)
    torch.testing.assert_close(LamOperator.of(values).solve(rows), want)


def test_solve_gives_0_where_lam_is_not_positive():
    rows = torch.ones(2, 3, dtype=torch.float64)
    got = LamOperator.of(tensor([2.0, 0.0, -1.0])).solve(rows)
    assert torch.equal(got, tensor([[0.5, 0.0, 0.0]]).expand(2, 3))
    assert (LamOperator.of(torch.diag(tensor([1.0, 1.0, -1.0]))).solve(rows) == 0).all()


def test_the_fused_and_the_unfused_part_add_up_to_the_product(values):
    operator = LamOperator.of(values)
    phi, theta = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    rows = torch.randn(3, 7, dtype=torch.float64)
    got = operator.add_unfused(rows, phi, theta) + operator.fused * (phi - theta)
    torch.testing.assert_close(got, rows + product(phi - theta, values))
    torch.testing.assert_close(
        operator.add_unfused(rows, phi) + operator.fused * phi, rows + product(phi, values)
    )
    assert operator.fused.shape in ((1,), (7,))


def test_diagonal_is_that_of_the_matrix(values):
    got = LamOperator.of(values).diagonal().expand(3, 7)
    torch.testing.assert_close(got, matrices(values).diagonal(dim1=1, dim2=2))


def test_the_operator_of_one_task_is_that_of_its_row(values):
    rows = torch.randn(3, 7, dtype=torch.float64)
    whole = LamOperator.of(values).mv(rows)
    for task in range(3):
        alone = LamOperator.of(LamOperator.of(values).of_task(task))
        torch.testing.assert_close(alone.mv(rows[task : task + 1]), whole[task : task + 1])


def test_norms_and_validity_are_per_task_where_the_values_are(values):
    operator, batch = LamOperator.of(values), (3,) if values.dim() == 3 else ()
    assert operator.norm().shape == operator.is_valid().shape == batch
    want = [values[task].norm() for task in range(3)] if batch else values.norm()
    torch.testing.assert_close(operator.norm(), torch.as_tensor(want, dtype=torch.float64))
    values[(0,) * values.dim()] = -1.0
    want = [False, True, True] if batch else False
    assert LamOperator.of(values).is_valid().tolist() == want


def test_the_gradient_is_that_of_the_quadratic_form(values):
    # Λ enters x' Λ (theta - phi) linearly; for a dense Λ the gradient is the symmetric part.
    x, displacement = torch.randn(2, 3, 7, dtype=torch.float64)
    leaf = values.clone().requires_grad_()
    total = -(x * LamOperator.of(leaf).mv(displacement)).sum()
    (want,) = torch.autograd.grad(total, leaf)
    want = (want + want.T) / 2 if want.dim() == 2 else want  # per task, a 3-d tensor
    torch.testing.assert_close(LamOperator.of(values).gradient(x, displacement), want)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (tensor([1e-300]), True),
        (tensor([0.0]), False),
        (tensor([1.0, -1.0]), False),
        (tensor([1.0, torch.inf]), False),
        (tensor([torch.nan]), False),
        (torch.eye(2), True),
        (tensor([[1.0, 1.0], [1.0, 1.0 + 1e-9]]), True),
        (tensor([[1.0, 2.0], [2.0, 1.0]]), False),  # eigenvalues 3 and -1
        (tensor([[1.0, 0.1], [0.0, 1.0]]), False),  # not symmetric
        (tensor([[1.0, torch.nan], [torch.nan, 1.0]]), False),
    ],
    ids=str,
)
def test_a_matrix_is_positive_definite_if_finite_symmetric_and_positive(values, expected):
    got = LamOperator.of(values).is_positive_definite()
    assert got.shape == ()
    assert got.item() == expected


def forms():
    return {
        "0-d": tensor(0.7),
        "per tensor": {"w": tensor(2.0), "b": tensor(3.0)},
        "diagonal": {"w": torch.rand(2, 3, dtype=torch.float64) + 1, "b": tensor(3.0)},
        "dense": dense(),
        "in another order": {"b": tensor(3.0), "w": tensor(2.0)},
        "[B]": tensor([0.5, 0.7]),
        "[B, D]": torch.rand(2, 7, dtype=torch.float64) + 1,
        "per task": {"w": torch.rand(2, 2, 3, dtype=torch.float64) + 1, "b": tensor([2.0, 3.0])},
        "per task in part": {"b": tensor([2.0, 3.0]), "w": tensor(2.0)},
        "per task and tensor": {"w": tensor([[[2.0]], [[4.0]]]), "b": tensor([3.0, 5.0])},
        "per row": {"w": tensor([[2.0], [4.0]]), "b": tensor(3.0)},
    }


def test_flatten_lam_orders_the_entries_like_the_parameters():
    assert torch.equal(flatten_lam(LAYOUT, 1.5), tensor([1.5]))
    want = {
        "0-d": tensor([0.7]),
        "per tensor": tensor([2.0] * 6 + [3.0]),
        "in another order": tensor([2.0] * 6 + [3.0]),
        "per row": tensor([2.0] * 3 + [4.0] * 3 + [3.0]),
    }
    for name, expected in want.items():
        assert torch.equal(flatten_lam(LAYOUT, forms()[name]), expected)
    want = {
        "[B]": [[0.5], [0.7]],
        "per task in part": [[2.0] * 6 + [2.0], [2.0] * 6 + [3.0]],
        "per task and tensor": [[2.0] * 6 + [3.0], [4.0] * 6 + [5.0]],
    }
    for name, expected in want.items():
        assert torch.equal(flatten_lam(LAYOUT, forms()[name]), tensor(expected)[:, None])
    diagonal = forms()["diagonal"]
    flat = flatten_lam(LAYOUT, diagonal)
    assert torch.equal(flat[:6].view(2, 3), diagonal["w"])
    assert flat[6] == 3


@pytest.mark.parametrize("form", forms())
def test_unflattening_a_gradient_is_the_derivative_of_flattening(form):
    lam = forms()[form]
    leaves = [lam] if isinstance(lam, torch.Tensor) else list(lam.values())
    for leaf in leaves:
        leaf.requires_grad_()
    flat = flatten_lam(LAYOUT, lam)
    gradient = torch.randn_like(flat)
    want = torch.autograd.grad(flat, leaves, gradient)
    got = unflatten_lam_gradient(LAYOUT, lam, gradient)
    assert isinstance(got, torch.Tensor) or list(got) == list(lam)
    got = [got] if isinstance(got, torch.Tensor) else list(got.values())
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_shape_that_does_not_broadcast_is_refused():
    for shape in ((2,), (3,), (1, 2), (4, 3, 2), (5, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"lam\['w'\] must be .*has the shape \[B, 1, 1\]"):
            flatten_lam(LAYOUT, {"w": torch.ones(shape).double(), "b": tensor(3.0)})


def test_a_float_has_no_gradient():
    assert unflatten_lam_gradient(LAYOUT, 1.0, tensor([2.0])) is None


def test_linear_systems_accept_any_finite_lam():
    b = torch.zeros(2, 7, dtype=torch.float64)
    for lam, shape in [(-1.0, (1,)), (tensor(0.0), (1,)), (tensor([1.0]), (1,)),
                       (torch.zeros(7).double(), (7,)), (dense(), (7, 7)),
                       (torch.zeros(2, 1).double(), (2, 1, 1)),
                       (torch.zeros(2, 7).double(), (2, 1, 7)),
                       (torch.zeros(2, 1, 7).double(), (2, 1, 7))]:  # fmt: skip
        assert lam_of_rows(lam, b).values.shape == shape
    with pytest.raises(ValueError, match=r"lam must be finite, got 1e\+300, in torch.float32"):
        lam_of_rows(1e300, b.float())
    with pytest.raises(ValueError, match=r"lam must be \[7\] torch.float64"):
        lam_of_rows(torch.zeros(7), b)


@pytest.mark.parametrize("form", ["scalar", "tensor", "diagonal", "dense"])
def test_weight_decay_pulls_a_proximal_strength_towards_the_identity(form):
    strength = ProximalStrength(PARAMS, 5.0, form=form)
    optimizer = torch.optim.SGD(strength.parameters(), lr=0.1, weight_decay=1.0)

    def distance():
        return (matrix(flatten_lam(LAYOUT, strength())) - torch.eye(7).double()).norm().item()

    before = distance()
    for _ in range(100):
        optimizer.zero_grad()
        sum(p.sum() for p in strength.parameters()).mul(0).backward()
        optimizer.step()
    assert distance() < 0.02 * before


def test_a_dense_lam_of_no_systems_is_accepted():
    empty = torch.zeros(0, 0)
    assert conjugate_gradient(lambda p: p, empty, lam=empty, max_iter=1).value.shape == (0, 0)
