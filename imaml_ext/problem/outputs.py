"""A model's outputs of any structure as one tensor z, for the Gauss-Newton matrix."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import MemberDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from imaml_ext._tracing import may_synchronise
from imaml_ext.problem.attributes import NOT_SEARCHED
from imaml_ext.problem.unsupported import MOST_NODES, graph_nodes

_DEPTH = 4  # of objects in objects


class _Part(NamedTuple):
    """Stands for a tensor: its number in z or among the constants, and its shape and type."""

    number: int
    shape: torch.Size  # of the real tensor
    dtype: torch.dtype
    is_complex: bool = False
    is_constant: bool = False


class OutputParts:
    """Takes outputs apart into tensors, and puts other tensors in their place.

    Outputs are tensors, containers that PyTorch's pytrees know, objects with tensors as attributes,
    and dicts of other classes, such as the outputs of HuggingFace's models; nested in any way.
    Whatever is not a tensor stays as it is.
    """

    def take_apart(self, outputs: Any) -> tuple[Tensor, list[Tensor]]:
        """z, and the integer and boolean tensors, which are constant.

        z is the tensor itself if there is only one, else all of them flattened and concatenated.
        """
        z: list[Tensor] = []
        constants: list[Tensor] = []
        parts: dict[int, _Part] = {}

        def take(t: Tensor) -> _Part:
            if id(t) not in parts:
                if t.is_floating_point() or t.is_complex():
                    real = torch.view_as_real(t) if t.is_complex() else t
                    parts[id(t)] = _Part(len(z), real.shape, real.dtype, t.is_complex())
                    z.append(real)
                else:
                    parts[id(t)] = _Part(len(constants), t.shape, t.dtype, is_constant=True)
                    constants.append(t)
            return parts[id(t)]

        self._outputs = _replace(outputs, Tensor, take)
        if not z:
            raise TypeError(
                "curvature='ggn' needs outputs with floating-point tensors, got "
                f"{type(outputs).__name__}: use curvature='hessian'"
            )
        self._sizes = [t.numel() for t in z]
        return z[0] if len(z) == 1 else torch.cat([t.flatten() for t in z]), constants

    def put_together(self, z: Tensor, constants: list[Tensor]) -> Any:
        """The outputs, with the values of z and of the constants."""
        split = [z] if len(self._sizes) == 1 else z.split(self._sizes)

        def put(part: _Part) -> Tensor:
            if part.is_constant:
                return constants[part.number]
            t = split[part.number].view(part.shape).to(part.dtype)
            return torch.view_as_complex(t) if part.is_complex else t

        return _replace(self._outputs, _Part, put)


def check_parameters(losses: Tensor, rows: Tensor, model: nn.Module) -> None:
    """Raises ValueError if the criterion uses parameters: it is differentiated by outputs only."""
    if _uses(losses, rows, {id(parameter) for parameter in model.parameters()}):
        raise ValueError(
            "the criterion uses the model's parameters, which curvature='ggn' cannot take into "
            "account: use ConjugateGradient(curvature='hessian'), in HessianFree too"
        )


def check_stored(together: Tensor, losses: Tensor, rows: Tensor) -> None:
    """Raises ValueError if the criterion uses other results of forward than its outputs.

    Args:
        together: losses of detached outputs, computed while the model had what forward stored.
        losses: the same without that.
        rows: the parameters that forward had.
    """
    found = _uses(together, rows)
    if not found and may_synchronise(losses):  # tensors without gradients; once per loss
        tolerance = torch.finfo(losses.dtype).eps ** 0.5
        found = not torch.allclose(together, losses, tolerance, tolerance, equal_nan=True)
    if found:
        raise ValueError(_STORED)


@contextmanager
def refusing_stored() -> Iterator[None]:
    """Context of a criterion without what forward stored; with it, there was no error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_STORED) from error


_STORED = (
    "the criterion uses tensors that forward stores or keeps in a closure, which curvature='ggn' "
    "cannot take into account: return them from forward, or use "
    "ConjugateGradient(curvature='hessian'), in HessianFree too"
)


def _uses(losses: Tensor, rows: Tensor, leaves: Collection[int] = ()) -> bool:
    """Whether the graph contains the rows, or a leaf of these ids."""
    end: Any = torch.autograd.graph.get_gradient_edge(rows).node
    nodes = list(graph_nodes(losses.grad_fn, None))
    found = any(node is end or id(getattr(node, "variable", None)) in leaves for node in nodes)
    if not found and len(nodes) >= MOST_NODES - 1:
        (gradient,) = torch.autograd.grad(losses.sum(), rows, retain_graph=True, allow_unused=True)
        found = gradient is not None
    return found


def _replace(value: Any, kind: type, function: Callable[[Any], Any], depth: int = _DEPTH) -> Any:
    """A copy of the value with `function(part)` for each part of this kind."""
    if isinstance(value, kind):
        return function(value)
    leaves, structure = pytree.tree_flatten(value, is_leaf=lambda v: isinstance(v, kind))
    if len(leaves) != 1 or leaves[0] is not value:
        leaves = [_replace(leaf, kind, function, depth) for leaf in leaves]
        return pytree.tree_unflatten(leaves, structure)
    if not _contains(value, kind, depth):
        return value
    cls: Any = type(value)
    new = cls.__new__(cls)
    if isinstance(value, dict):
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        for key, entry in value.items():
            base.__setitem__(new, key, _replace(entry, kind, function, depth - 1))
    for name, attribute in _attributes(value):
        object.__setattr__(new, name, _replace(attribute, kind, function, depth - 1))
    return new


def _contains(value: Any, kind: type, depth: int) -> bool:
    if isinstance(value, kind):
        return True
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, kind))
    if len(leaves) != 1 or leaves[0] is not value:
        return any(_contains(leaf, kind, depth) for leaf in leaves)
    parts = [attribute for _, attribute in _attributes(value)]
    parts += value.values() if isinstance(value, dict) else ()
    return depth > 0 and any(_contains(part, kind, depth - 1) for part in parts)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, NOT_SEARCHED):
        return
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        if "__slots__" in vars(cls):
            for name, member in vars(cls).items():
                if isinstance(member, MemberDescriptorType):
                    with suppress(AttributeError):  # not set
                        yield name, member.__get__(value)
