"""Random calls of every operator, and which calls are valid, independent of the checks in C++."""

from dataclasses import dataclass, field
from typing import Any

import layer_formulas
import row_formulas
import torch
from fuzz import Tensors, filled, sampled, seeds, variants
from hypothesis import strategies as st

from imaml_ext import ops

FLOATS = (torch.float32, torch.float64)
KINDS = {"d": torch.float64, "i": torch.int32}  # "t" is the dtype of the call


@dataclass(frozen=True)
class Operator:
    """Operands as "NAME:SIZES:KIND", one letter per size; "*" is written, "?" is optional."""

    operands: str
    results: tuple[str, ...] = ()  # by the names in the formulas
    sizes: str = "rows"
    empty: bool = True  # whether operands may be empty

    def parsed(self):
        for operand in self.operands.split():
            name, sizes, kind = operand.rstrip("*?").split(":")
            yield name, sizes, kind, operand.endswith("*") or operand.endswith("*?"), "?" in operand


STATE = "rr:B:d* rz:B:d*? tol2:B:d status:B:i* steps:B:i* curvature:B:d* beta:B:d*"
PROX = "grad:BD:t theta:D:t lam:L:t"
CHANNELS = "gamma:BC:t beta:BC:t"
OPERATORS = {
    "cg_step_": Operator(
        f"x:BD:t* r:BD:t* p:BD:t* hp:BD:t lam:L:t inverse:BD:t? {STATE}"
    ),
    "prox_gd_": Operator(f"phi:BD:t* velocity:BD:t*? {PROX} status:B:i?"),
    "prox_adam_": Operator(
        f"phi:BD:t* first_moment:BD:t* second_moment:BD:t* {PROX} status:B:i?"
    ),
    "prox_norms": Operator(f"phi:BD:t {PROX}", ("result",)),
    "row_dot": Operator("a:BD:t b:BD:t", ("result",)),
    "pull_back": Operator(
        "x:BD:t phi:BD:t theta:D:t weight:1:t use:B:i", ("x_sum", "product_sum")
    ),
    "conv": Operator("x:BNHWC:t w:BOCKM:t bias:BO:t?", ("result",), "images", False),
    "conv_data_gradient": Operator("g:BNPQO:t w:BOCKM:t", ("result",), "images", False),
    "conv_weight_gradient": Operator("x:BNHWC:t g:BNPQO:t", ("result",), "images", False),
    "patches": Operator("x:BNHWC:t", ("result",), "images", False),
    "patches_transpose": Operator("g:BRE:t", ("result",), "images", False),
    "channel_sums": Operator("g:BRC:t", ("result",), "norm", False),
    "batched_product": Operator("a:BRK:t b:BCK:t", ("result",), "product", False),
    "batch_norm": Operator(
        f"x:BRC:t {CHANNELS}", ("result", "positive", "mean", "scale"), "norm", False
    ),
    "batch_norm_backward": Operator(
        f"g:BRC:t x:BRC:t {CHANNELS} mean:BC:t scale:BC:t",
        ("result", "dgamma", "dbeta"), "norm", False,
    ),
    "batch_norm_double_backward": Operator(
        f"a:BRC:t b:BC:t c:BC:t g:BRC:t x:BRC:t {CHANNELS} mean:BC:t scale:BC:t",
        ("result", "to_x", "to_gamma"), "norm", False,
    ),
}  # fmt: skip


@dataclass(repr=False)
class Call(Tensors):
    """An operator, its tensors, and its numbers."""

    operator: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def __repr__(self):
        tensors = ", ".join(
            f"{name}={None if t is None else f'{list(t.shape)} {t.dtype} {t.stride()}'}"
            for name, t in self.by_name.items()
        )
        return f"{self.operator}({tensors}, {self.numbers})"

    def __call__(self):
        arguments = self.by_name | self.numbers
        on_rows = OPERATORS[self.operator].sizes == "rows"
        out = getattr(ops if on_rows else torch.ops.imaml, self.operator)(**arguments)
        if self.operator == "prox_norms":
            return (torch.stack(out, 1),)
        return out if isinstance(out, tuple) else (out,)

    def written(self):
        return {
            name: self.by_name[name]
            for name, _, _, writes, _ in OPERATORS[self.operator].parsed()
            if writes and self.by_name[name] is not None
        }

    def expected(self):
        rows = OPERATORS[self.operator].sizes == "rows"
        formula = getattr(row_formulas if rows else layer_formulas, self.operator)
        return formula(self.by_name | self.numbers)


@st.composite
def sizes_of(draw, kind):
    if kind == "norm":
        return {"B": draw(sampled(1, 2, 3)), "R": draw(sampled(1, 2, 7, 63, 64, 65, 130)),
                "C": draw(sampled(1, 2, 15, 16, 17, 33))}  # fmt: skip
    if kind == "product":
        sides = sampled(1, 2, 9, 16, 33, 64, 65)
        return {"B": draw(sampled(1, 2, 3)), "R": draw(sides), "C": draw(sides),
                "K": draw(sampled(1, 4, 9, 31, 33, 130, 300))}  # fmt: skip
    if kind == "rows":
        dim = draw(sampled(0, 1, 2, 3, 15, 16, 17, 31, 255, 256, 257, 4095, 4096, 4097, 8193))
        rows = draw(sampled(0, 1, 2, 3, 17)) if dim < 4000 else draw(sampled(1, 2))
        return {"B": rows, "D": dim, "L": draw(sampled(1, dim)), "1": 1}
    size = {name: draw(st.integers(1, 3)) for name in "BNKM"}
    size |= {"O": draw(sampled(1, 2, 7, 8, 9, 16, 17)), "C": draw(sampled(1, 2, 5, 6, 7, 8, 17))}
    for side, kernel, out in (("H", "K", "P"), ("W", "M", "Q")):
        size[f"s{side}"], size[f"p{side}"] = draw(st.integers(1, 4)), draw(st.integers(0, 3))
        least = max(1, size[kernel] - 2 * size[f"p{side}"])
        size[side] = draw(st.integers(least, least + 5))
        room = size[side] + 2 * size[f"p{side}"] - size[kernel]
        size[out] = room // size[f"s{side}"] + 1
    return size | {"R": size["N"] * size["P"] * size["Q"], "E": size["C"] * size["K"] * size["M"]}


# Representable in float32.
NEAR_ONE = st.floats(-2, 2, width=32, allow_subnormal=False)
FACTORS = st.one_of(sampled(0.0, -0.5, 1.0, 1e-12), NEAR_ONE)
ODD_FACTORS = st.one_of(FACTORS, sampled(torch.nan, torch.inf, -torch.inf, 1e300, -1e300))
SHARES = st.one_of(sampled(0.0, 0.9, 0.999), NEAR_ONE.map(lambda x: abs(x) / 2.001))


@st.composite
def numbers_of(draw, operator, size):
    if operator == "cg_step_":
        return {"damping": draw(st.one_of(sampled(0.0, 0.25), ODD_FACTORS))}
    if operator == "prox_gd_":
        momentum = draw(st.one_of(sampled(0.0), ODD_FACTORS))
        return {"lr": draw(ODD_FACTORS), "momentum": momentum, "nesterov": draw(st.booleans())}
    if operator == "prox_adam_":
        betas = {"beta1": draw(SHARES), "beta2": draw(SHARES)}
        steps = {"eps": draw(sampled(1e-8, 1e-3, 0.0)), "step": draw(sampled(1, 2, 100, 2**62))}
        return {"lr": draw(FACTORS)} | betas | steps
    if OPERATORS[operator].sizes == "images":
        sides = {"stride_h": size["sH"], "stride_w": size["sW"]}
        sides |= {"pad_h": size["pH"], "pad_w": size["pW"]}
        inputs = {"in_h": size["H"], "in_w": size["W"]}
        kernel = {"kernel_h": size["K"], "kernel_w": size["M"]}
        own = {"conv_data_gradient": inputs, "conv_weight_gradient": kernel,
               "patches": kernel, "patches_transpose": inputs | kernel}  # fmt: skip
        return own.get(operator, {}) | sides
    if operator == "batched_product":
        return {"transpose_a": False, "transpose_b": True}
    if operator == "batch_norm":
        return {"eps": draw(sampled(1e-5, 1.0, 1e-2, 1e10)), "relu": draw(st.booleans())}
    return {"relu": draw(st.booleans())} if operator.startswith("batch_norm") else {}


@st.composite
def calls(draw, operator, device="cpu"):
    """Valid calls with arbitrary values."""
    spec, dtype = OPERATORS[operator], draw(sampled(*FLOATS))
    size = draw(sizes_of(spec.sizes))
    tensors = {}
    for name, letters, kind, _, optional in spec.parsed():
        shape = [size[letter] for letter in letters]
        if optional and name != "rz" and draw(st.booleans()):
            tensors[name] = None
        elif kind == "i":
            codes = torch.Generator().manual_seed(draw(seeds))
            bound, fill = (6, 0) if name == "status" else (3, 1)
            value = torch.randint(-1 + fill, bound, shape, generator=codes, dtype=torch.int32)
            keep = torch.rand(shape, generator=codes) < 0.7  # most rows are RUNNING
            tensors[name] = torch.where(keep, 0, value).to(device, torch.int32)
        else:
            tensors[name] = filled(
                shape, KINDS.get(kind, dtype), variant=draw(variants), seed=draw(seeds),
                device=device,
            )  # fmt: skip
    numbers = draw(numbers_of(operator, size))
    if operator == "prox_adam_" and tensors["second_moment"].numel():
        tensors["second_moment"].abs_()
    if operator == "prox_gd_" and tensors["velocity"] is None:
        numbers["momentum"] = 0.0
    if operator == "cg_step_":
        make_consistent(tensors, draw)
    if "scale" in tensors:
        tensors["scale"].abs_()
    for name in contiguous_per_task(operator):
        if draw(st.booleans()):
            tensors[name] = with_gaps(tensors[name], draw(sampled("rows", "shared")))
    return Call(tensors, operator=operator, numbers=numbers)


def make_consistent(tensors, draw):
    """p is random or has positive curvature; rr and rz are r·r and r·z."""
    if draw(st.booleans()):
        tensors["hp"].copy_(tensors["p"] * draw(sampled(2.0, 0.0, -1.0)))
        tensors["lam"].abs_()
    squares = tensors["r"].double() ** 2
    tensors["rr"].copy_(squares.sum(1))
    tensors["tol2"].copy_(tensors["rr"] * draw(sampled(0.0, 1e-3, 1.0, 1e6, torch.nan)))
    if tensors["inverse"] is None:
        tensors["rz"] = None
    else:
        if draw(st.booleans()):
            tensors["inverse"].abs_()
        tensors["rz"].copy_((squares * tensors["inverse"].double()).sum(1))


def contiguous_per_task(operator):
    """Operands that need only be contiguous within each task."""
    if OPERATORS[operator].sizes == "rows":
        return ()
    names = [name for name, *_ in OPERATORS[operator].parsed()]
    return [name for name in names if name in ("w", "gamma", "beta", "b", "c")]


def with_gaps(w, how):
    """Slices of rows of parameters, or the same parameters for all tasks."""
    if how == "shared":
        return w[:1].expand(w.shape)
    rows = torch.full((len(w), w[0].numel() + 3), 7.0, dtype=w.dtype, device=w.device)
    rows[:, 1:-2] = w.flatten(1)
    return rows[:, 1:-2].unflatten(1, w.shape[1:])


def is_valid(call):
    """Whether the call is valid according to the documentation of its operator."""
    spec, numbers, size = OPERATORS[call.operator], call.numbers, {"1": 1}
    present = {n: t for n, t in call.by_name.items() if t is not None}
    dtypes = {
        present[name].dtype
        for name, _, kind, _, _ in spec.parsed()
        if kind == "t" and name in present
    }
    if (
        len(dtypes) != 1
        or not dtypes <= set(FLOATS)
        or len({t.device for t in present.values()}) > 1
    ):
        return False
    for name, letters, kind, _, optional in spec.parsed():
        if name not in present:
            if not optional:
                return False
            continue
        t = present[name]
        if kind != "t" and t.dtype != KINDS[kind]:
            return False
        if t.dim() != len(letters) or (t.numel() == 0 and not spec.empty):
            return False
        for letter, length in zip(letters, t.shape, strict=True):
            if letter != "L" and size.setdefault(letter, length) != length:
                return False
        whole = t[0] if name in contiguous_per_task(call.operator) else t
        if not whole.is_contiguous():
            return False
    if "lam" in present and len(present["lam"]) not in (1, size["D"]):
        return False
    rules = {
        "cg_step_": lambda: (call.by_name["inverse"] is None) == (call.by_name["rz"] is None),
        "prox_gd_": lambda: "velocity" in present or numbers["momentum"] == 0,
        "prox_adam_": lambda: (
            all(0 <= numbers[beta] < 1 for beta in ("beta1", "beta2")) and numbers["step"] >= 1
        ),
        "batch_norm": lambda: numbers["eps"] > 0,
    }
    if not rules.get(call.operator, lambda: True)():
        return False
    return (spec.sizes != "images" or window_is_valid(size, numbers)) and not overlapping(call)


def window_is_valid(size, numbers):
    size = size | {"H": numbers.get("in_h", size.get("H")), "W": numbers.get("in_w", size.get("W"))}
    size |= {
        "K": numbers.get("kernel_h", size.get("K")),
        "M": numbers.get("kernel_w", size.get("M")),
    }
    for side, kernel, out, letter in (("H", "K", "P", "h"), ("W", "M", "Q", "w")):
        stride, pad = numbers[f"stride_{letter}"], numbers[f"pad_{letter}"]
        largest = max(size[side], size[kernel], stride, pad)
        if stride < 1 or pad < 0 or min(size[side], size[kernel]) < 1 or largest >= 2**31:
            return False
        room = size[side] + 2 * pad - size[kernel]
        if room < 0 or size.setdefault(out, room // stride + 1) != room // stride + 1:
            return False
    if "E" not in size:  # a direct convolution, without patches
        return size["P"] * size["Q"] < 2**50
    rows, columns = size["P"] * size["Q"], size["K"] * size["M"]
    return size["R"] % rows == 0 and size["E"] % columns == 0


def overlapping(call):
    spans = {
        name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
        for name, t in call.by_name.items()
        if t is not None and t.device.type != "meta" and t.numel()
    }
    return any(
        first != second and spans[first][0] < end and begin < spans[first][1]
        for first in call.written().keys() & spans.keys()
        for second, (begin, end) in spans.items()
    )
