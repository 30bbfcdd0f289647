"""Tensors that a loss uses besides its arguments: those of a model, of a closure, globals."""

import inspect
import weakref
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.problem.unsupported import MOST_NODES, graph_nodes


def leaves_besides(losses: Tensor, rows: Tensor) -> tuple[list[Tensor], bool, bool]:
    """Tensors that require grad in the graph of `losses`, besides `rows`.

    Also returns whether the graph contains `rows`, and whether it was searched completely.
    """
    end: Any = torch.autograd.graph.get_gradient_edge(rows).node
    nodes = list(graph_nodes(losses.grad_fn, end))
    leaves = [node.variable for node in nodes if hasattr(node, "variable") and node is not end]
    return leaves, end in nodes, len(nodes) < MOST_NODES - 1


def captured_message(loss: Any, leaves: Sequence[Tensor], adapted: Collection[str]) -> str:
    """What is wrong with a loss that depends on leaves which its arguments do not contain.

    Args:
        loss: the function of one task, in whose variables the leaves are looked up.
        leaves: tensors that require grad.
        adapted: names of the adapted parameters.
    """
    names = _names(loss)
    found = [names[id(leaf)] for leaf in leaves if id(leaf) in names]
    own = [name for name in found if any(f".{name}".endswith(f".{each}") for each in adapted)]
    if own:
        return (
            f"the loss depends on {_listed(own)} of the model, not on the adapted parameters: "
            "compute it from the params that it receives"
        )
    if not found:  # the variables may have been computed from the leaves
        found = [name for name, value in _tensors(loss) if value.requires_grad]
    found = found or [f"a tensor of shape {list(leaf.shape)}" for leaf in leaves]
    it = "it" if len(found) == 1 else "them"
    verb = "requires" if len(found) == 1 else "require"
    return (
        f"the loss depends on {_listed(found) or 'a tensor'}, which {verb} grad, but not through "
        f"the params that it receives: pass {it} in shared= to differentiate by {it}, or call "
        f"requires_grad_(False) or detach() to keep {it} constant"
    )


class Usage(TorchFunctionMode):
    """The state of the data and of whatever else a loss uses, to detect changes.

    As a context it records the tensors, not vmapped, that operators receive.

    Attributes:
        recorded: whether an evaluation of the loss has been recorded.
    """

    def __init__(self, loss: Any, data: Any) -> None:
        super().__init__()
        self.recorded = False
        self._loss = loss
        self._data = [(leaf, _state(leaf)) for leaf in pytree.tree_leaves(data)]
        self._modules = [(name, m, m.training) for name, m in _modules(loss)]
        # Weak references: most are temporary, and could not change.
        self._tensors: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for operand in (*args, *kwargs.values()):
            for each in operand if isinstance(operand, (list, tuple)) else (operand,):
                if isinstance(each, Tensor):
                    self._record(each)
        return function(*args, **kwargs)

    def _record(self, tensor: Tensor) -> None:
        if id(tensor) in self._tensors or _functorch.is_functorch_wrapped_tensor(tensor):
            return
        self._tensors[id(tensor)] = weakref.ref(tensor), _state(tensor)

    def check_unchanged(self) -> None:
        """Raises RuntimeError where data, tensors or training flags have changed."""
        for number, (leaf, state) in enumerate(self._data):
            if _state(leaf) != state:
                raise RuntimeError(_CHANGED.format(f"support (tensor {number})"))
        for name, module, training in self._modules:
            if module.training != training:
                now, then = ("train()", "eval()") if module.training else ("eval()", "train()")
                raise RuntimeError(
                    f"{name} was in {then} mode in adapt and is in {now} mode in backward: "
                    "differentiate in the same mode"
                )
        for reference, state in self._tensors.values():
            tensor = reference()
            if tensor is not None and _state(tensor) != state:
                found = _names(self._loss).get(
                    id(tensor), f"a tensor of shape {list(tensor.shape)}"
                )
                raise RuntimeError(_CHANGED.format(f"{found}, which the loss uses,"))


_CHANGED = (
    "{} was modified between adapt and backward, which would give another gradient: call backward "
    "before, or pass a copy to adapt"
)


def _state(tensor: Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if tensor.layout is torch.strided else 0


def _names(loss: Any) -> dict[int, str]:
    """Names of the tensors in a loss's variables, by identity."""
    names: dict[int, str] = {}
    for name, tensor in _tensors(loss):
        names.setdefault(id(tensor), name)
    return names


def _tensors(loss: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in _variables(loss):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield name, leaf
            elif isinstance(leaf, nn.Module):
                for own, tensor in (*leaf.named_parameters(), *leaf.named_buffers()):
                    yield f"{name}.{own}" if name else own, tensor


def _modules(loss: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, value in _variables(loss):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, nn.Module):
                for own, module in leaf.named_modules():
                    path = ".".join(part for part in (name, own) if part)
                    yield f"{path} ({type(module).__name__})" if path else "the model", module


def _variables(function: Any) -> Iterator[tuple[str, Any]]:
    """Variables by name in which a function finds tensors: those of its closure, and globals."""
    if isinstance(function, ModuleLoss):
        yield "", function.model
        yield from _variables(function.criterion)
    elif isinstance(function, nn.Module):
        yield "", function
    elif isinstance(function, partial):
        yield from function.keywords.items()
        yield from (("an argument", value) for value in function.args)
        yield from _variables(function.func)
    elif inspect.ismethod(function):
        yield from _variables(function.__self__)
        yield from _variables(function.__func__)
    elif inspect.isfunction(function):
        found = inspect.getclosurevars(function)
        yield from {**found.globals, **found.nonlocals}.items()
    else:
        yield from getattr(function, "__dict__", {}).items()


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    rest = f" and {len(unique) - 3} others" if len(unique) > 3 else ""
    return ", ".join(unique[:3]) + rest
