"""Random calls: valid ones give the values of the formulas, others raise and write nothing.

`row_formulas.py` and `layer_formulas.py` are the oracle; `operator_calls.py` decides which calls
are valid, so wrong refusals and missing refusals are both detected.
"""

import pytest
import torch
from fuzz import memory, sampled, tried
from hypothesis import assume, example, given
from hypothesis import strategies as st
from operator_calls import OPERATORS, Call, calls, is_valid

import imaml_ext
from imaml_ext import ops

pytestmark = pytest.mark.fuzz

CUDA = torch.cuda.is_available() and bool(imaml_ext.build_info()["cuda"])
OTHERS = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64,
    torch.bool, torch.complex64,
)  # fmt: skip


def assert_formula(call, expected, results):
    spec = OPERATORS[call.operator]
    got = dict(zip(spec.results, results, strict=False)) | call.written()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        (value, slack), actual = expected[name], tensor.double()
        assert tensor.shape == value.shape, name
        # A slack of -1: any value that is not finite.
        same = (actual == value) | (actual.isnan() & value.isnan())
        same = torch.where(slack < 0, ~actual.isfinite(), same)
        right = same | slack.isinf() | ((actual - value).abs() <= slack)
        assert right.all(), f"{name}: {actual[~right][:3]}, not {value[~right][:3]}"


def check_valid(call):
    expected = call.expected()
    call.remember()
    results = call()
    tried[call.operator] += 1
    assert call.changed(but=call.written()) == []
    assert_formula(call, expected, results if OPERATORS[call.operator].results else ())


def has_cuda_kernel(operator):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"imaml::{operator}", "CUDA")


DEVICES = [
    (operator, device)
    for operator in OPERATORS
    for device in ("cpu", "cuda")
    if device == "cpu" or (CUDA and has_cuda_kernel(operator))
]


@pytest.mark.parametrize(("operator", "device"), DEVICES)
def test_a_valid_call_gives_the_formula_and_writes_nothing_else(operator, device):
    @given(calls(operator, device))
    def check(call):
        check_valid(call)

    check()


# ---- invalid calls ---------------------------------------------------------------------------

WRONG_NUMBERS = {
    "cg_step_": {},
    "prox_gd_": {"momentum": [0.5, torch.nan]},
    "prox_adam_": {"beta1": [1.0, -0.1, torch.nan, torch.inf], "beta2": [1.0, 2.0, torch.nan],
                   "step": [0, -1, -(2**63)]},
    "batch_norm": {"eps": [0.0, -1e-5, torch.nan, -torch.inf]},
}  # fmt: skip
WINDOWS = {
    **{f"stride_{s}": [0, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)] for s in "hw"},
    **{f"pad_{s}": [-1, 9, 2**31, 2**61, 2**62, 2**63 - 1, -(2**63)] for s in "hw"},
    **{f"in_{s}": [0, -1, 1, 9, 2**31, 2**62, 2**63 - 1] for s in "hw"},
    **{f"kernel_{s}": [0, -1, 1, 9, 2**31, 2**62, 2**63 - 1] for s in "hw"},
}


@st.composite
def corrupted(draw, operator):
    """A valid call with one or two random changes, most of them invalid."""
    call = draw(calls(operator))
    for _ in range(draw(st.integers(1, 2))):
        wrong = WRONG_NUMBERS.get(operator) or {n: WINDOWS[n] for n in call.numbers if n in WINDOWS}
        ways = ["dtype", "shape", "layout", "memory", "device", "huge"]
        ways += ["memory"] * 3 * operator.endswith("_")  # written operands must not overlap others
        ways += ["number"] * 3 * bool(wrong) + ["absent"] * ("?" in OPERATORS[operator].operands)
        way = draw(st.sampled_from(ways))
        if way == "number":
            name = draw(st.sampled_from(sorted(wrong)))
            call.numbers[name] = draw(st.sampled_from(wrong[name]))
            continue
        if way == "absent":
            optional = [name for name, *_, may in OPERATORS[operator].parsed() if may]
            call.by_name[draw(st.sampled_from(optional))] = None
            continue
        small = [n for n, t in call.by_name.items() if t is not None and t.numel() < 2**20]
        if not small:
            break  # the only operand is already huge
        name = draw(st.sampled_from(small))
        call.by_name[name] = CORRUPT[way](draw, call, name)
    return call


def corrupt_shape(draw, call, name):
    t = call.by_name[name]
    how = draw(sampled("row", "drop", "flat", "front", "back", "none"))
    if how in ("row", "drop", "none") and t.dim():
        at = draw(st.integers(0, t.dim() - 1))
        if how == "row":
            return torch.cat([t, t.narrow(at, 0, min(1, t.shape[at]))], at)
        return t.narrow(at, 0, max(0, t.shape[at] - 1) if how == "drop" else 0).contiguous()
    return {"flat": t.reshape(-1), "front": t[None]}.get(how, t[..., None]).contiguous()


def corrupt_layout(draw, call, name):
    t = call.by_name[name]
    if not t.dim():
        return t
    at = draw(st.integers(0, t.dim() - 1))
    how = draw(sampled("transposed", "expanded", "strided", "reversed sizes"))
    if how == "transposed":
        return t.movedim(at, 0).contiguous().movedim(0, at)
    if how == "expanded" and t.shape[at]:
        return t.narrow(at, 0, 1).expand(t.shape)
    if how == "strided":
        return torch.stack([t, t], t.dim())[..., 0]
    return t.movedim(at, 0)


def corrupt_memory(draw, call, name):
    """The operand shares the memory of another one, from one of its first elements on."""
    t = call.by_name[name]
    others = {
        n: o for n, o in call.by_name.items()
        if n != name and o is not None and o.device.type != "meta" and o.is_contiguous()
    }  # fmt: skip
    if not others or t.device.type == "meta":
        return t
    onto = others[draw(st.sampled_from(sorted(others)))]
    start = onto.storage_offset() * onto.element_size() + draw(st.integers(0, 3)) * 8
    span = t.numel() * t.element_size()
    room = memory(onto)[start : start + span]
    if start % t.element_size() or len(room) < span:
        return t
    return room.view(t.dtype).view(t.shape)


CORRUPT = {
    "dtype": lambda draw, call, name: torch.empty_like(
        call.by_name[name], dtype=draw(sampled(*OTHERS))
    ).fill_(1),
    "shape": corrupt_shape,
    "layout": corrupt_layout,
    "memory": corrupt_memory,
    "device": lambda draw, call, name: call.by_name[name].to("meta"),
    "huge": lambda draw, call, name: (
        call.by_name[name].new_zeros(()).expand([2**31] * draw(st.integers(1, 2)))
    ),
}


def check_corrupted(call):
    assume(any(t is not None and t.device.type != "meta" for t in call.by_name.values()))
    if is_valid(call):
        return check_valid(call)
    call.remember()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as refusal:
        call()
    tried[call.operator] += 1
    assert str(refusal.value).startswith(f"{call.operator}: ")
    assert "\n" not in str(refusal.value)
    assert call.changed() == []


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_invalid_call_is_refused_by_name_and_writes_nothing(operator):
    @given(corrupted(operator))
    def check(call):
        check_corrupted(call)

    check()


@pytest.mark.parametrize("number", [2**31, 2**61, 2**62, 2**63 - 1])
@pytest.mark.parametrize("name", ["stride_h", "stride_w", "pad_h", "pad_w", "in_h", "in_w"])
def test_sizes_whose_indices_would_overflow_are_refused(name, number):
    # Strides of 2^63 - 1 once wrote outside the result.
    g, w = torch.rand(1, 1, 1, 1, 1), torch.rand(1, 1, 1, 1, 1)
    window = {"in_h": 5, "in_w": 5, "stride_h": 5, "stride_w": 5, "pad_h": 0, "pad_w": 0}
    with pytest.raises(RuntimeError, match=r"conv_data_gradient: .* below 2\^31"):
        torch.ops.imaml.conv_data_gradient(g, w, **(window | {name: number}))


def test_patches_of_more_than_2_to_63_values_are_refused():
    x, most = torch.rand(1, 1, 1, 1, 2), 2**31 - 1
    with pytest.raises(RuntimeError, match=r"^patches: patches have 2\^63 or more values"):
        torch.ops.imaml.patches(x, most, most, 1, 1, most, most)
    with pytest.raises(RuntimeError, match=r"^patches_transpose: patches have 2\^63"):
        torch.ops.imaml.patches_transpose(x[0, 0], 1, 1, most, most, 1, 1, most, most)


def test_a_result_that_cannot_be_allocated_is_refused_by_name():
    x, w = torch.rand(1, 1, 2, 2, 1), torch.rand(1, 1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"^conv: cannot allocate a result of shape \[1, 1, "):
        torch.ops.imaml.conv(x, w, None, 1, 1, 2**31 - 1, 2**31 - 1)


# ---- meta tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_meta_results_have_the_shapes_of_real_results(operator):
    @given(calls(operator))
    def check(call):
        on_meta = {n: None if t is None else t.to("meta") for n, t in call.by_name.items()}
        results = Call(on_meta, operator=operator, numbers=call.numbers)()
        shapes = [(t.shape, t.dtype) for t in results if t is not None]
        assert shapes == [(t.shape, t.dtype) for t in call() if t is not None]
        tried[operator] += 1

    check()


@given(st.integers(0, 2**31), st.integers(0, 2**29))
@example(2**31, 2**29)
def test_meta_rows_may_have_any_number_and_size(rows, dim):
    a = torch.empty(rows, dim, device="meta")
    assert ops.row_dot(a, a).shape == (rows,)
    norms = ops.prox_norms(a, a, a.new_empty(dim), a.new_empty(1))
    assert [t.shape for t in norms] == [(rows,), (rows,)]
    nothing = torch.empty(0, dim)
    assert ops.row_dot(nothing, nothing).shape == (0,)
    tried["row_dot"] += 2
    tried["prox_norms"] += 1
