"""The parameter layout against torch.cat and indexing."""

import pytest
import torch

from imaml_ext.problem.layout import Layout

PARAMS = {"w": torch.randn(2, 3), "empty": torch.zeros(0, 4), "b": torch.randn(())}


def test_flatten_concatenates_in_the_order_of_the_layout():
    layout = Layout(PARAMS)
    other_order = {name: PARAMS[name] for name in ("b", "w", "empty")}
    flat = layout.flatten(other_order)
    assert torch.equal(flat, torch.cat([PARAMS["w"].flatten(), PARAMS["b"][None]]))
    assert layout.dim == 7


def test_rows_have_the_parameters_of_one_task_each():
    layout = Layout(PARAMS)
    rows = torch.randn(5, 7)
    batch = layout.unflatten(rows)
    assert torch.equal(batch["w"][3], rows[3, :6].view(2, 3))
    assert torch.equal(batch["b"], rows[:, 6])
    assert batch["empty"].shape == (5, 0, 4)
    assert torch.equal(layout.flatten(batch), rows)


def test_gradients_flow_through_both_directions():
    layout = Layout(PARAMS)
    row = torch.randn(7, requires_grad=True)
    parts = layout.unflatten(row)
    layout.flatten({name: 2 * t for name, t in parts.items()}).sum().backward()
    assert torch.equal(row.grad, torch.full((7,), 2.0))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"w": torch.zeros(3, 2), "empty": torch.zeros(0, 4), "b": torch.zeros(())}, ValueError,
         r"phi\['w'\] must be of shape \[2, 3\], got \[3, 2\]"),
        ({"w": torch.zeros(2, 3)}, ValueError, "phi must name"),
        ({"w": torch.zeros(2, 2, 3), "empty": torch.zeros(0, 4), "b": torch.zeros(2)}, ValueError,
         r"phi\['empty'\] must be of shape \[2, 0, 4\]"),
        ({**PARAMS, "b": torch.zeros(()).double()}, ValueError, r"phi\['b'\] is torch.float64"),
        ([torch.zeros(7)], TypeError, "phi must map names to tensors"),
    ],
)  # fmt: skip
def test_mismatched_tensors_are_rejected(params, error, message):
    with pytest.raises(error, match=message):
        Layout(PARAMS).flatten(params, "phi")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "params is empty"),
        ({"w": torch.zeros(0)}, ValueError, "params has only empty tensors"),
        ({"w": torch.zeros(2).half()}, TypeError, "must be float32 or float64"),
        ({"w": torch.zeros(2), "b": torch.zeros(2, device="meta")}, ValueError,
         r"params\['b'\] is torch.float32 on meta, but params\['w'\] is torch.float32 on cpu"),
        (dict.fromkeys("ab", torch.zeros(2)), ValueError,
         r"params\['b'\] is the same tensor as params\['a'\]"),
    ],
)  # fmt: skip
def test_parameters_without_a_layout_are_rejected(params, error, message):
    with pytest.raises(error, match=message):
        Layout(params)
