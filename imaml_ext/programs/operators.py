"""PyTorch's operators by the form of the instructions that compute them."""

import math
import operator
from typing import Any

import torch
from torch import fx

aten, prims = torch.ops.aten, torch.ops.prims


class UnsupportedOperator(RuntimeError):
    """A program cannot contain this operator."""


UNARY: dict[Any, str] = {
    getattr(aten, name).default: name
    for name in (
        "neg", "abs", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "sin", "cos",
        "tanh", "sigmoid", "erf", "relu", "floor", "ceil", "sign",
    )
} | {aten.sgn.default: "sign"}  # fmt: skip
TESTS: dict[Any, str] = {aten.logical_not.default: "logical_not", aten.isnan.default: "isnan"}
BINARY: dict[Any, str] = {
    getattr(getattr(aten, name), overload): name
    for name in ("add", "sub", "mul", "div")
    for overload in ("Tensor", "Scalar")
} | {
    **{getattr(prims, name).default: name for name in ("add", "sub", "mul", "div")},
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "pow",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.tanh_backward.default: "tanh_backward",
    aten.sigmoid_backward.default: "sigmoid_backward",
}
COMPARISONS: dict[Any, str] = {
    getattr(getattr(aten, name), overload): name
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for overload in ("Tensor", "Scalar")
} | {
    aten.logical_and.default: "logical_and",
    aten.logical_or.default: "logical_or",
    aten.bitwise_and.Tensor: "logical_and",
    aten.bitwise_or.Tensor: "logical_or",
}
BITWISE: set[Any] = {aten.bitwise_and.Tensor, aten.bitwise_or.Tensor}
VIEWS: set[Any] = {
    aten.alias.default, aten.as_strided.default, aten.diagonal.default, aten.expand.default,
    aten.narrow.default, aten.permute.default, aten.select.int, aten.slice.Tensor,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int,
    aten.unfold.default, aten.unsqueeze.default,
}  # fmt: skip
SPLITS: set[Any] = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
RESHAPES: set[Any] = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
SAME: set[Any] = {
    aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default, aten.alias.default,
    aten.contiguous.default, aten.lift_fresh.default,
}  # fmt: skip
REDUCTIONS: dict[Any, str] = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "sum",
    aten.mean.dim: "sum",
    aten.amax.default: "amax",
    aten.amin.default: "amin",
}
FILLED: dict[Any, float | None] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.empty_like.default: math.nan,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.zeros.default: 0.0,
    aten.ones.default: 1.0,
    aten.full.default: None,
    aten.full_like.default: None,
    aten.new_full.default: None,
    aten.scalar_tensor.default: None,
}


IN_PLACE: dict[Any, str] = {
    getattr(getattr(aten, f"{name}_"), overload): name
    for name in ("add", "sub", "mul", "div")
    for overload in ("Tensor", "Scalar")
} | {
    **{getattr(aten, f"{name}_").default: name for name in UNARY.values()},
    aten.fill_.Scalar: "fill",
    aten.zero_.default: "fill",
    aten.copy_.default: "copy",
    aten.masked_fill_.Scalar: "masked_fill",
    aten.unsqueeze_.default: "unsqueeze",
    aten.squeeze_.dim: "squeeze",
    aten.transpose_.default: "transpose",
    aten.t_.default: "t",
}


_DETACH = (aten.detach.default,)


def is_view(node: fx.Node) -> bool:
    """Whether a node's result shares memory with its first argument."""
    target: Any = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem:  # of a split, or of an operator with several results
        source: Any = node.args[0]
        return source.target in SPLITS
    return any(target in kinds for kinds in (VIEWS, SPLITS, RESHAPES, IN_PLACE, _DETACH))


def meta_of(node: fx.Node) -> Any:
    """Shape and dtype of a node's result."""
    return node.meta.get("val", node.meta.get("tensor_meta"))
