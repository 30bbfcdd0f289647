"""The instructions of _C.Program on the CPU, compared with torch's operators in float64."""

import itertools
import math
import re
import threading

import pytest
import torch
from torch import Tensor

from imaml_ext import _C

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64",
         torch.int32: "int32", torch.uint8: "uint8", torch.bool: "uint8"}  # fmt: skip
TASKS = 3
HARD = [0.0, -0.0, 1.0, -1.0, 0.5, -0.3, 1e-3, -1e-6, 1e-30, 3.7, -2.5, 17.0, -33.0, 88.5, -88.5,
        104.0, -104.0, 709.5, -745.0, 1e10, -1e10, 1e30, math.inf, -math.inf, math.nan]  # fmt: skip

UNARY = {
    "copy": lambda x: x, "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "exp": torch.exp,
    "log": torch.log, "log1p": torch.log1p, "expm1": torch.expm1, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "sin": torch.sin, "cos": torch.cos,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf, "relu": torch.relu,
    "floor": torch.floor, "ceil": torch.ceil, "logical_not": torch.logical_not,
    "isnan": torch.isnan,
}  # fmt: skip
BINARY = {
    "add": lambda a, b: a + 0.3 * b, "sub": lambda a, b: a - 0.3 * b, "mul": torch.mul,
    "div": torch.div, "pow": torch.pow, "maximum": torch.maximum, "minimum": torch.minimum,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "threshold_backward": lambda g, x: torch.ops.aten.threshold_backward(g, x, 0.3),
    "tanh_backward": lambda g, y: torch.ops.aten.tanh_backward(g, y),
    "sigmoid_backward": lambda g, y: torch.ops.aten.sigmoid_backward(g, y),
}  # fmt: skip
SCALARS = {"add": [0.3], "sub": [0.3], "threshold_backward": [0.3]}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def run(name, result: Tensor, operands, *, integers=(), scalars=(), strides=None) -> None:
    """Runs one instruction on views [tasks, *sizes], each in its own slot, expanded to the first's
    sizes or with the strides given."""
    sizes = strides["sizes"] if strides else list(result.shape[1:])
    tensors = [result, *operands]
    layouts = strides["strides"] if strides else [t.stride()[1:] for t in tensors]
    program = _C.Program(
        NAMES[result.dtype], 0, [], [NAMES[t.dtype] for t in tensors],
        [(name, sizes, [(k + 2, 0, list(s)) for k, s in enumerate(layouts)], list(integers),
          list(scalars))])  # fmt: skip
    program.run(len(result), [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors])


def layouts_of(shape, dtype):
    """Random tensors [TASKS, *shape]: contiguous, transposed, strided, and repeated in a loop."""
    yield torch.randn(TASKS, *shape, dtype=dtype)
    yield torch.randn(TASKS, *shape[::-1], dtype=dtype).permute(0, *range(len(shape), 0, -1))
    yield torch.randn(TASKS, *(2 * n + 1 for n in shape), dtype=dtype)[
        (slice(None), *(slice(1, 2 * n + 1, 2) for n in shape))
    ]
    yield torch.randn(TASKS, shape[0], *(1 for _ in shape[1:]), dtype=dtype).expand(TASKS, *shape)
    yield torch.randn(TASKS, *(1 for _ in shape[1:]), shape[-1], dtype=dtype).expand(TASKS, *shape)


def close(got: Tensor, want: Tensor, *, ulps: float = 4) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(
        got, want.to(got.dtype), rtol=ulps * eps, atol=torch.finfo(got.dtype).tiny * eps * ulps,
        equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary_functions_are_those_of_torch(name, dtype):
    hard = torch.cat([torch.tensor(HARD, dtype=torch.float64), torch.randn(300).double() * 10])
    x = hard.to(dtype)[None]
    got = torch.empty_like(x)
    run(name, got, [x])
    close(got, UNARY[name](x.double()))


@pytest.mark.parametrize("name", BINARY)
def test_binary_functions_are_those_of_torch(name, dtype):
    values = [*(v for v in HARD if abs(v) < 100 or not math.isfinite(v)), *torch.randn(20).tolist()]
    a, b = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 2).T.contiguous()
    got = torch.empty_like(a)
    run(name, got[None], [a[None], b[None]], scalars=SCALARS.get(name, ()))
    want = BINARY[name](a.double(), b.double())
    torch.testing.assert_close(
        got, want.to(dtype), rtol=4 * torch.finfo(dtype).eps,
        atol=4 * torch.finfo(dtype).eps * (1 if name in ("add", "sub") else 1e-30),
        equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (7,), (16,), (33,), (10, 40), (3, 5, 9), (2, 1, 3, 4)])
def test_maps_take_any_layout(shape, dtype):
    for a, b in itertools.product(layouts_of(shape, dtype), layouts_of(shape, dtype)):
        for out in itertools.islice(layouts_of(shape, dtype), 3):
            run("sub", out, [a, b], scalars=[1.0])
            close(out, a - b)
            run("tanh", out, [a])
            close(out, a.double().tanh())
            run("where", out, [(a > 0).to(dtype), a, b])
            close(out, torch.where(a > 0, a, b))


def test_an_elementwise_result_may_replace_its_operand(dtype):
    a, b = torch.randn(2, 1, 37, dtype=dtype)
    want = a * b
    run("mul", a, [a, b])
    close(a, want)


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.int64, torch.int32,
                                    torch.uint8, torch.bool])  # fmt: skip
def test_copy_converts(source, dtype):
    x = (torch.arange(TASKS * 5 * 9).reshape(TASKS, 5, 9) % 7 * 31 % 5).to(source)
    got = torch.empty(TASKS, 9, 5, dtype=dtype)
    run("copy", got, [x.mT])
    assert torch.equal(got, x.mT.to(dtype))


@pytest.mark.parametrize("name", ["sum", "amax", "amin"])
@pytest.mark.parametrize("shape", [(1,), (17,), (10, 40), (40, 10), (1, 5), (3, 5, 9), (100, 3)])
def test_reductions_over_any_loops_in_any_layout(name, shape, dtype):
    dims = range(1, len(shape) + 1)
    for a in layouts_of(shape, dtype):
        for count in range(len(shape) + 1):
            for reduced in itertools.combinations(dims, count):
                kept = [1 if d in reduced else n for d, n in enumerate(shape, start=1)]
                out = torch.empty(TASKS, *kept, dtype=dtype)
                run(name, out.expand(TASKS, *shape), [a])
                want = getattr(a.double(), name)(reduced, keepdim=True) if reduced else a
                scale = a.double().abs().sum(reduced, keepdim=True) if reduced else a.abs()
                ulps = 16 if name == "sum" and dtype == torch.float64 else int(name == "sum")
                assert ((out - want).abs() <= ulps * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize(("name", "want"), [("sum", 0.0), ("amax", -math.inf), ("amin", math.inf)])
def test_a_reduction_of_nothing(name, want, dtype):
    out = torch.empty(4, dtype=dtype)
    program = _C.Program(NAMES[dtype], 0, [], [NAMES[dtype]] * 2,
                         [(name, [4, 0], [(2, 0, [1, 0]), (3, 0, [0, 1])], [], [])])  # fmt: skip
    assert program.extents == [4, 0]
    program.run(1, [out.data_ptr(), 0], [0, 0])
    assert (out == want).all()


@pytest.mark.parametrize("name", ["amax", "amin"])
def test_the_extremum_of_a_row_with_nan_is_nan(name, dtype):
    for at in range(40):
        a = torch.randn(1, 40, dtype=dtype)
        a[0, at] = math.nan
        out = torch.empty(1, 1, dtype=dtype)
        run(name, out.expand(1, 40), [a])
        assert out.isnan().all()


def product(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None) -> None:
    """out[t] = c[t] + a[t] b[t] for [tasks, .., M, K] and [tasks, .., K, N]."""
    *batch, m, k = a.shape[1:]
    n = b.shape[-1]
    rows = [
        (*out.stride()[1:-2], out.stride(-2), out.stride(-1), 0),
        (*a.stride()[1:-2], a.stride(-2), 0, a.stride(-1)),
        (*b.stride()[1:-2], 0, b.stride(-1), b.stride(-2)),
    ]
    if c is not None:
        rows.append((*c.stride()[1:-2], c.stride(-2), c.stride(-1), 0))
    run("matmul", out, [a, b] if c is None else [a, b, c],
        strides={"sizes": [*batch, m, n, k], "strides": rows})  # fmt: skip


SIZES = [(10, 40, 40), (10, 1, 40), (1, 40, 10), (40, 1, 10), (10, 40, 1), (1, 1, 1), (6, 16, 5),
         (7, 17, 9), (13, 5, 33), (2, 8, 64), (1, 9, 70), (25, 33, 8)]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_in_any_layout(m, n, k, dtype):
    def variants(rows, columns):
        yield torch.randn(TASKS, rows, columns, dtype=dtype)
        yield torch.randn(TASKS, columns, rows, dtype=dtype).mT
        yield torch.randn(TASKS, rows, 2 * columns + 1, dtype=dtype)[..., 1::2]

    bias = torch.randn(TASKS, 1, n, dtype=dtype).expand(TASKS, m, n)
    for a, b, out in itertools.product(variants(m, k), variants(k, n), variants(m, n)):
        for c in (None, bias, bias.mT.contiguous().mT, torch.randn(TASKS, m, n, dtype=dtype)):
            product(out, a, b, c)
            want = a.double() @ b.double() + (0 if c is None else c)
            scale = a.double().abs() @ b.double().abs() + (0 if c is None else c.abs())
            assert ((out - want).abs() <= 4 * torch.finfo(dtype).eps * scale).all()


def test_a_product_of_depth_0_is_what_it_is_added_to(dtype):
    c, out = torch.randn(2, 3, 5, dtype=dtype)
    operands = [(2, 0, [5, 1, 0]), (3, 0, [0, 0, 1]), (3, 0, [0, 1, 5]), (4, 0, [5, 1, 0])]
    slots, pointers = [NAMES[dtype]] * 3, [out.data_ptr(), 0, c.data_ptr()]
    for count, want in ((3, torch.zeros_like(c)), (4, c)):
        one = ("matmul", [3, 5, 0], operands[:count], [], [])
        program = _C.Program(NAMES[dtype], 0, [], slots, [one])
        assert program.extents == [15, 0, 15 * (count - 3)]
        program.run(1, pointers, [0, 0, 0])
        assert torch.equal(out, want)


def test_products_have_batch_loops(dtype):
    a = torch.randn(TASKS, 4, 2, 5, 7, dtype=dtype)
    b = torch.randn(TASKS, 2, 7, 9, dtype=dtype)[:, None].expand(TASKS, 4, 2, 7, 9)
    out = torch.empty(TASKS, 4, 2, 5, 9, dtype=dtype)
    product(out, a, b)
    assert ((out - a.double() @ b.double()).abs() <= 50 * torch.finfo(dtype).eps).all()


def test_gather_and_scatter_are_those_of_torch(dtype):
    source = torch.randn(TASKS, 6, 5, dtype=dtype)
    index = torch.randint(5, (TASKS, 6, 4))
    exact = index.to(dtype)
    out = torch.empty(TASKS, 6, 4, dtype=dtype)
    layout = {"sizes": [6, 4], "strides": [(4, 1), (5, 0), (4, 1)]}
    run("gather", out, [source, exact], integers=[1, 5], strides=layout)
    assert torch.equal(out, source.gather(2, index))

    values = torch.randn(TASKS, 6, 4, dtype=dtype)
    layout = {"sizes": [6, 4], "strides": [(5, 0), (4, 1), (4, 1)]}
    added, written = source.clone(), source.clone()
    run("scatter_add", added, [exact, values], integers=[1, 5], strides=layout)
    close(added, source.scatter_add(2, index, values))
    unique = torch.rand(TASKS, 6, 5).argsort(-1)[..., :4]
    run("scatter_set", written, [unique.to(dtype), values], integers=[1, 5], strides=layout)
    assert torch.equal(written, source.scatter(2, unique, values))


@pytest.mark.parametrize("bad", [5.0, -1.0, 1e20, math.nan, math.inf])
def test_an_index_out_of_range_is_an_error_and_touches_no_memory(bad, dtype):
    source, index = torch.randn(1, 5, dtype=dtype), torch.tensor([[1.0, bad, 2.0]], dtype=dtype)
    out = torch.full((1, 3), 7.0, dtype=dtype)
    layout = {"sizes": [3], "strides": [(1,), (0,), (1,)]}
    with pytest.raises(IndexError, match="out of range"):
        run("gather", out, [source, index], integers=[1, 5], strides=layout)
    assert torch.equal(out[0, [0, 2]], source[0, [1, 2]])
    want = source.clone()
    want[0, [1, 2]] = 7.0
    layout = {"sizes": [3], "strides": [(0,), (1,), (1,)]}
    with pytest.raises(IndexError, match="out of range"):
        run("scatter_set", source, [index, torch.full((1, 3), 7.0, dtype=dtype)],
            integers=[1, 5], strides=layout)  # fmt: skip
    assert torch.equal(source, want)


def test_arena_constants_and_shared_buffers(dtype):
    """sum_i (2 x_i + w_i)^2 by way of the arena, with w shared by all tasks."""
    program = _C.Program(
        NAMES[dtype], 9, [2.0], [NAMES[dtype]] * 3,
        [("mul", [9], [(0, 0, [1]), (2, 0, [1]), (1, 0, [0])], [], []),
         ("add", [9], [(0, 0, [1]), (0, 0, [1]), (3, 0, [1])], [], [1.0]),
         ("mul", [9], [(0, 0, [1]), (0, 0, [1]), (0, 0, [1])], [], []),
         ("sum", [9], [(4, 0, [0]), (0, 0, [1])], [], [])])  # fmt: skip
    assert program.extents == [9, 9, 1]
    x, w, out = (
        torch.randn(25, 9, dtype=dtype),
        torch.randn(9, dtype=dtype),
        torch.empty(25).to(dtype),
    )
    pointers, strides = [t.data_ptr() for t in (x, w, out)], [9, 0, 1]
    program.run(25, pointers, strides)
    close(out, (2 * x.double() + w).square().sum(1), ulps=8)
    again = torch.empty_like(out)
    arguments = (25, [*pointers[:2], again.data_ptr()], strides)
    threads = [threading.Thread(target=program.run, args=arguments) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(again, out)


ADD = ("add", [4], [(0, 0, [1]), (2, 0, [1]), (1, 0, [0])], [], [1.0])


def changed(**changes):
    fields = dict(zip(("name", "sizes", "operands", "integers", "scalars"), ADD, strict=True))
    return tuple({**fields, **changes}.values())


@pytest.mark.parametrize(("instruction", "message"), [
    (changed(name="frobnicate"), "unknown instruction 'frobnicate'"),
    (changed(operands=ADD[2][:2]), "add: expected 3 operands, got 2"),
    (changed(scalars=[]), "add: expected 1 scalars, got 0"),
    (changed(integers=[1]), "add: expected 0 integers, got 1"),
    (changed(sizes=[-1]), "add: sizes must not be negative, got -1"),
    (changed(sizes=[1] * 7), "add: expected 0 to 6 loops, got 7"),
    (changed(sizes=[2, 2]), "add: operand 0 must have 2 strides, got 1"),
    (changed(sizes=[5]), "add: operand 0 leaves its slot of 4 elements: its last index is 4"),
    (changed(operands=[(0, 0, [0]), *ADD[2][1:]]), "stride of 0 in a loop of size 4"),
    (changed(operands=[(0, 0, [-1]), *ADD[2][1:]]), "operand 0 must not have a negative stride"),
    (changed(operands=[(0, -1, [1]), *ADD[2][1:]]), "operand 0 must not have a negative offset"),
    (changed(operands=[(1, 0, [1]), *ADD[2][1:]]), "must not be in the constants"),
    (changed(operands=[*ADD[2][:2], (1, 0, [1])]), "operand 2 leaves its slot of 1 elements"),
    (changed(operands=[*ADD[2][:2], (4, 0, [1])]), "operand 2 must be in slot 0 to 3, got 4"),
    (changed(operands=[*ADD[2][:2], (3, 0, [1])]), "only 'copy' converts"),
    (("matmul", [2, 2, 2], [(0, 0, [2, 1, 0]), (2, 0, [2, 0, 1]), (2, 0, [1, 1, 2])], [], []),
     "matmul: operand 2 must have stride 0 along m, got 1"),
])  # fmt: skip
def test_an_invalid_instruction_is_an_error(instruction, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        _C.Program("float32", 4, [1.0], ["float32", "int64"], [instruction])


def test_invalid_arguments_are_errors():
    for dtypes in (("int64", []), ("float32", ["float16"])):
        with pytest.raises(ValueError, match="float32"):
            _C.Program(dtypes[0], 0, [], dtypes[1], [])
    with pytest.raises(ValueError, match="arena"):
        _C.Program("float32", -1, [], [], [])
    copy = [("copy", [4], [(2, 0, [1]), (3, 0, [1])], [], [])]
    program = _C.Program("float32", 0, [], ["float32", "float32"], copy)
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="expected 2 pointers"):
        program.run(1, [x.data_ptr()], [8])
    with pytest.raises(ValueError, match="shared by all tasks"):
        program.run(2, [x.data_ptr()] * 2, [0, 8])
    with pytest.raises(ValueError, match="null"):
        program.run(1, [0, x.data_ptr()], [0, 8])
    with pytest.raises(ValueError, match="negative"):
        program.run(-1, [x.data_ptr()] * 2, [0, 8])
    program.run(0, [0, 0], [0, 0])
