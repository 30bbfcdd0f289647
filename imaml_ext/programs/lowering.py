"""From a traced graph to instructions on arrays."""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from imaml_ext.programs.arrays import Array, Kind, indexed, placed_dimensions
from imaml_ext.programs.instruction import Instruction
from imaml_ext.programs.layers import LAYERS
from imaml_ext.programs.operators import (
    BINARY,
    BITWISE,
    COMPARISONS,
    FILLED,
    IN_PLACE,
    REDUCTIONS,
    RESHAPES,
    SAME,
    SPLITS,
    TESTS,
    UNARY,
    VIEWS,
    UnsupportedOperator,
    aten,
    is_view,
    meta_of,
    prims,
)


class Lowering:
    """Translates a graph, node by node.

    Args:
        dtype: of the program's arithmetic.
        inputs: an array for each placeholder of the graph.

    Attributes:
        instructions: in order.
        outputs: the graph's outputs.

    Raises:
        UnsupportedOperator: the graph has an operator, or a dtype, without an instruction.
    """

    def __init__(self, graph: fx.Graph, dtype: torch.dtype, inputs: Sequence[Array]) -> None:
        self.dtype = dtype
        self.instructions: list[Instruction] = []
        self.outputs: list[Array] = []
        self._values: dict[fx.Node, Any] = {}
        self._known: dict[Any, Array] = {}  # results of maps
        self._memory: dict[fx.Node, fx.Node] = {}  # the node whose result a node's is a view of
        given = iter([self._converted(a) for a in inputs])
        for node in graph.nodes:
            self._memory[node] = self._memory[node.args[0]] if is_view(node) else node
            if node.op == "placeholder":
                self._values[node] = next(given)
            elif node.op == "output":
                self.outputs = list(fx.node.map_arg(node.args[0], self._values.__getitem__))
            else:
                self._values[node] = self._lower(node)

    def _lower(self, node: fx.Node) -> Any:
        target: Any = node.target
        args: Any = fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs: Any = fx.node.map_arg(dict(node.kwargs), self._values.__getitem__)
        if target is operator.getitem:
            return args[0][args[1]]
        if target in IN_PLACE:
            return self._modify(node, *args)
        if target in FILLED:
            return self._filled(node, args)
        if target in VIEWS:
            return args[0].view(lambda t: target(t, *args[1:], **kwargs))
        if target in SPLITS:
            return args[0].views(lambda t: target(t, *args[1:], **kwargs))
        if target in RESHAPES:
            return self._reshape(args[0], args[1])
        if target is aten.where.self and meta_of(node).dtype.is_floating_point:
            return self._map("where", args, "float")  # exact in any precision
        kind = self._kind(node)
        if target in SAME:
            return args[0].with_kind(kind)
        if target is aten._to_copy.default:
            return self._converted_to(node, args[0], kind)
        if target in UNARY:
            return self._map(UNARY[target], args, kind)
        if target in TESTS:
            return self._map(TESTS[target], args, "bool")
        if target is aten.bitwise_not.default and args[0].kind == "bool":
            return self._map("logical_not", args, "bool")
        if target in BINARY:
            if kind != "float":
                raise UnsupportedOperator(f"{target} of integers")
            return self._binary(BINARY[target], args, kwargs, kind)
        if target in COMPARISONS:
            if target in BITWISE and any(a.kind != "bool" for a in args):
                raise UnsupportedOperator(f"{target} of integers")
            return self._map(COMPARISONS[target], args, "bool")
        if target is aten.where.self:
            return self._map("where", args, kind)
        if target is aten.threshold_backward.default:
            return self._map("threshold_backward", args[:2], kind, (float(args[2]),))
        if target in REDUCTIONS:
            return self._reduce(node, *args, **kwargs)
        if target is prims.sum.default:
            return self._reduced("sum", args[0], args[1]).view(lambda t: t.squeeze(args[1]))
        if target is prims.broadcast_in_dim.default:
            return placed_dimensions(*args)
        if target is prims.var.default:
            return self._variance(*args, **kwargs)
        if target in (aten.mm.default, aten.bmm.default):
            return self._matmul(*args)
        if target is aten.cat.default:
            return self._cat(kind, *args, **kwargs)
        if target is aten.select_scatter.default:
            source, value, dim, start = args
            return self._inserted(source, value.view(lambda t: t.unsqueeze(dim)), dim, start)
        if target is aten.slice_scatter.default:
            return self._inserted(*args)
        if target in LAYERS:
            return self._layer(node, args)
        if target is aten.gather.default:
            return self._gather(*args)
        if target in (aten.scatter.src, aten.scatter.value, aten.scatter_add.default):
            return self._scatter(target is aten.scatter_add.default, *args)
        shared = " with the same weight for all tasks" if target is aten.convolution.default else ""
        raise UnsupportedOperator(f"{target}{shared}")

    def _modify(self, node: fx.Node, a: Array, *others: Any) -> Array:
        """An operator in place: later reads of the array get the result."""
        if a.buffer.input is not None:
            raise UnsupportedOperator(f"{node.target} of an input")
        name = IN_PLACE[node.target]
        if name in ("unsqueeze", "squeeze", "transpose", "t"):
            result = a.view(lambda t: getattr(t, name)(*others))
            self._values[node.all_input_nodes[0]] = result
            return result
        if name == "fill":
            result = Array.filled(others[0] if others else 0.0, a.shape, a.kind)
        elif name == "masked_fill":
            result = self._map("where", (others[0], others[1], a), a.kind)
        elif name == "copy":
            result = others[0].expanded(a.shape).with_kind(a.kind)
        elif name in UNARY.values():
            result = self._map(name, (a,), a.kind)
        elif a.kind == "float":
            result = self._binary(name, (a, *others), node.kwargs, a.kind)
        else:
            raise UnsupportedOperator(f"{node.target} of integers")
        for other, value in self._values.items():
            if self._memory[other] is self._memory[node] and isinstance(value, Array):
                self._values[other] = self._modified(node, value, a, result)
        return result

    def _modified(self, node: fx.Node, other: Array, a: Array, result: Array) -> Array:
        """The new value of another view of a modified array."""
        if other.identity == a.identity and other.shape == a.shape:
            return result
        same_place = other.offset == a.offset and other.size == a.size
        if same_place and other.is_contiguous and a.is_contiguous:
            return self._reshape(result, other.shape)
        raise UnsupportedOperator(f"{node.target} of a view")

    def _kind(self, node: fx.Node) -> Kind:
        """What a node computes: floats must have the program's dtype."""
        dtype = getattr(meta_of(node), "dtype", self.dtype)  # None of several results
        if dtype == self.dtype:
            return "float"
        if dtype == torch.bool:
            return "bool"
        if dtype.is_floating_point or dtype.is_complex:
            raise UnsupportedOperator(f"{node.target} in {dtype}")
        return "int"

    def _emit(
        self,
        name: str,
        sizes: Sequence[int],
        arrays: Sequence[Array],
        integers: Sequence[int] = (),
        scalars: Sequence[float] = (),
    ) -> None:
        self.instructions.append(
            Instruction(name, tuple(sizes), tuple(arrays), tuple(integers), tuple(scalars))
        )

    def _map(
        self, name: str, operands: Sequence[Any], kind: Kind, scalars: Sequence[float] = ()
    ) -> Array:
        arrays = [a if isinstance(a, Array) else Array.filled(a, ()) for a in operands]
        if kind == "int" and name != "where":
            raise UnsupportedOperator(f"{name} of integers")
        shape = torch.broadcast_shapes(*(a.shape for a in arrays))
        arrays = [a.expanded(shape) for a in arrays]
        key = name, tuple(scalars), shape, *(a.identity for a in arrays)
        if key not in self._known:  # the derivative of a loss repeats what the loss computes
            self._known[key] = Array.new(shape, kind)
            self._emit(name, shape, [self._known[key], *arrays], (), scalars)
        return self._known[key]

    def _binary(self, name: str, args: Any, kwargs: Any, kind: Kind) -> Array:
        """Arithmetic; without an instruction where it changes no value, as `x * 1`."""
        a, b = args[0], args[1]
        alpha = float(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
        scalars = (alpha,) if name in ("add", "sub") else ()
        right = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0, "pow": 1.0}.get(name)
        left = right if name == "mul" or (name == "add" and alpha == 1) else None
        for same, other, neutral in ((a, b, right), (b, a, left)):
            if neutral is not None and _constant(other) == neutral and _keeps_shape(same, other):
                unchanged: Array = same.with_kind(kind)
                return unchanged
        values = [_constant(a), _constant(b)]
        if None not in values:
            return self._folded(name, a, b, alpha, kind)
        if name == "pow" and values[1] == 2.0:
            return self._map("mul", (a, a), kind)
        return self._map(name, (a, b), kind, scalars)

    def _folded(self, name: str, a: Any, b: Any, alpha: float, kind: Kind) -> Array:
        """The result of an operator on two constants, computed in the program's dtype."""
        x, y = (torch.tensor(_constant(each), dtype=self.dtype, device="cpu") for each in (a, b))
        function: Any = getattr(torch, name, None) or getattr(aten, name)
        value = function(x, y, alpha=alpha) if name in ("add", "sub") else function(x, y)
        shapes = [each.shape if isinstance(each, Array) else () for each in (a, b)]
        return Array.filled(value.item(), torch.broadcast_shapes(*shapes), kind)

    def _filled(self, node: fx.Node, args: Any) -> Array:
        value = FILLED[node.target]
        if value is None:  # the number follows the shape, if there is one
            value = args[0] if node.target is aten.scalar_tensor.default else args[-1]
        like = meta_of(node)
        value = torch.tensor(value, dtype=like.dtype, device="cpu").item()
        kind: Kind = "float" if like.dtype.is_floating_point else "int"
        return Array.filled(value, like.shape, "bool" if like.dtype == torch.bool else kind)

    def _reshape(self, a: Array, shape: Sequence[int]) -> Array:
        if a.buffer.constant is not None:
            shape = torch.empty(a.shape, device="meta").reshape(tuple(shape)).shape
            return Array.filled(a.buffer.constant, shape, a.kind)
        try:
            return a.view(lambda t: t.view(tuple(shape)))
        except RuntimeError:
            return self.copied(a).view(lambda t: t.view(tuple(shape)))

    def _converted_to(self, node: fx.Node, a: Any, kind: Kind) -> Array:
        """A conversion; floats are not rounded to integers, and integers not to smaller ones."""
        if not isinstance(a, Array):
            return Array.filled(a, meta_of(node).shape, kind)
        if kind == "bool" != a.kind:
            return self._map("ne", (a, 0.0), "bool")
        if kind == "int" == a.kind and meta_of(node).dtype != torch.int64:
            raise UnsupportedOperator(f"a conversion to {meta_of(node).dtype}")
        return a.with_kind(kind)

    def _converted(self, a: Array) -> Array:
        """An input in the program's dtype."""
        return a if a.buffer.input == self.dtype else self.copied(a)

    def copied(self, a: Array) -> Array:
        """A copy in a new buffer."""
        result = Array.new(a.shape, a.kind)
        self._emit("copy", a.shape, [result, a])
        return result

    def _reduce(
        self, node: fx.Node, a: Array, dims: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> Array:
        dims, name = a.dimensions(dims), REDUCTIONS[node.target]
        if a.kind != "float" and name != "sum":  # a number of examples
            raise UnsupportedOperator(f"{node.target} of {a.kind}")
        result = self._reduced(name, a, dims)
        if node.target in (aten.mean.default, aten.mean.dim):
            result = self._divided(result, a.size / max(result.size, 1))
        return result if keepdim else result.view(lambda t: t.squeeze(dims))

    def _variance(self, a: Array, dims: Any = None, correction: float = 1) -> Array:
        dims = a.dimensions(dims)
        total = self._reduced("sum", a, dims)
        count = a.size // max(total.size, 1)
        centred = self._map("sub", (a, self._divided(total, count)), "float", (1.0,))
        squares = self._reduced("sum", self._map("mul", (centred, centred), "float"), dims)
        return self._divided(squares, count - correction).view(lambda t: t.squeeze(dims))

    def _reduced(self, name: str, a: Array, dims: Sequence[int]) -> Array:
        """The reduction, with reduced dimensions of size 1."""
        kind: Kind = "float" if a.kind == "float" else "int"
        result = Array.new([1 if d in dims else n for d, n in enumerate(a.shape)], kind)
        if a.size == 0:
            raise UnsupportedOperator("a reduction of an empty tensor")
        if result.size == a.size:
            return a.with_kind(kind)
        self._emit(name, a.shape, [result.expanded(a.shape), a])
        return result

    def _divided(self, a: Array, count: float) -> Array:
        return a if count == 1 else self._map("div", (a, float(count)), "float")

    def _matmul(self, a: Array, b: Array) -> Array:
        (m, k), n = a.shape[-2:], b.shape[-1]
        sizes = (*a.shape[:-2], m, n, k)
        result = Array.new((*a.shape[:-2], m, n))
        arrays = (
            result.view(lambda t: t.unsqueeze(-1).expand(sizes)),
            a.view(lambda t: t.unsqueeze(-2).expand(sizes)),
            b.view(lambda t: t.mT.unsqueeze(-3).expand(sizes)),
        )
        self._emit("matmul", sizes, arrays)
        return result

    def _cat(self, kind: Kind, arrays: Sequence[Array], dim: int = 0) -> Array:
        arrays = [a for a in arrays if a.size] or list(arrays[:1])
        shape = list(arrays[0].shape)
        dim %= len(shape)
        shape[dim] = sum(a.shape[dim] for a in arrays)
        result, start = Array.new(shape, kind), 0
        for a in arrays:
            part = result.view(partial(torch.narrow, dim=dim, start=start, length=a.shape[dim]))
            self._emit("copy", a.shape, [part, a])
            start += a.shape[dim]
        return result

    def _layer(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """A layer of this package; its operands must be contiguous."""
        layer = LAYERS[node.target]
        operands = [a if a.is_contiguous else self.copied(a) for a in layer.operands(args)]
        meta = meta_of(node)
        shapes = [t.shape for t in ([meta] if isinstance(meta, Tensor) else meta)]
        results = [Array.new(shape) for shape in shapes]
        integers, scalars = layer.settings(args, shapes)
        arrays = (*results, *operands)
        self.instructions.append(
            Instruction(layer.name, (), arrays, integers, scalars, written=len(results))
        )
        return results if len(results) > 1 else results[0]

    def _inserted(
        self,
        a: Array,
        value: Array,
        dim: int = 0,
        start: int | None = 0,
        end: Any = None,
        step: int = 1,
    ) -> Array:
        """The array with `value` in place of a slice."""
        if step != 1:
            raise UnsupportedOperator("slice_scatter with a step")
        count = a.shape[dim]
        first = min(max((start or 0) + (count if (start or 0) < 0 else 0), 0), count)
        after = first + value.shape[dim]
        before = a.view(lambda t: t.narrow(dim, 0, first))
        rest = a.view(lambda t: t.narrow(dim, after, count - after))
        return self._cat(a.kind, (before, value, rest), dim)

    def _gather(self, source: Array, dim: int, index: Array) -> Array:
        at, stride = indexed(source, dim, index.shape)
        result = Array.new(index.shape, source.kind)
        integers = (stride, source.shape[dim])
        self._emit("gather", index.shape, [result, at, index], integers)
        return result

    def _scatter(self, adds: bool, a: Array, dim: int, index: Array, value: Any) -> Array:
        value = value if isinstance(value, Array) else Array.filled(value, index.shape)
        value = value.view(lambda t: t[tuple(slice(n) for n in index.shape)])
        result = self.copied(a)
        at, stride = indexed(result, dim, index.shape)
        name = "scatter_add" if adds else "scatter_set"
        self._emit(name, index.shape, [at, index, value], (stride, a.shape[dim]))
        return result


def _constant(value: Any) -> float | None:
    if isinstance(value, Array):
        return value.buffer.constant
    return float(value)


def _keeps_shape(a: Any, b: Any) -> bool:
    shape = b.shape if isinstance(b, Array) else ()
    return isinstance(a, Array) and torch.broadcast_shapes(a.shape, shape) == a.shape
