"""Tensors that a loss uses besides its arguments: those of a model, of a closure, globals."""

import inspect
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
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
    names = captured_names(loss)
    found = [names[id(leaf)] for leaf in leaves if id(leaf) in names]
    own = [name for name in found if any(f".{name}".endswith(f".{each}") for each in adapted)]
    if own:
        return (
            f"the loss depends on {_listed(own)} of the model, not on the adapted parameters: "
            "compute it from the params that it receives"
        )
    if not found:  # the variables may have been computed from the leaves
        found = [
            name
            for name, t in captured_tensors(loss)
            if t.requires_grad and not (t.is_leaf and leaves) and name not in adapted
        ]
    found = found or [f"a tensor of shape {list(leaf.shape)}" for leaf in leaves]
    it = "it" if len(found) < 2 else "them"
    verb = "requires" if len(found) < 2 else "require"
    return (
        f"the loss depends on {_listed(found) or 'a tensor'}, which {verb} grad, but not as params "
        f"or shared: pass {it} in shared= to differentiate by {it}, or call "
        f"requires_grad_(False) or detach() to keep {it} constant"
    )


def captured_names(loss: Any) -> dict[int, str]:
    """Names of the tensors in a loss's variables, by identity."""
    names: dict[int, str] = {}
    for name, tensor in captured_tensors(loss):
        names.setdefault(id(tensor), name)
    return names


def captured_tensors(loss: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name that a loss may use: variables, and what modules among them hold."""
    for name, value in _variables(loss, set()):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield name, leaf
            elif isinstance(leaf, nn.Module):
                prefix = f"{name}." if name else ""
                yield from ((prefix + own, t) for own, t in _tensors_of_module(leaf))


def _tensors_of_module(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    for path, each in module.named_modules():
        for key, value in (*vars(type(each)).items(), *vars(each).items()):
            if not key.startswith("_"):
                for leaf in pytree.tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        yield f"{path}.{key}" if path else key, leaf
                    elif isinstance(leaf, nn.Module) and isinstance(value, (list, tuple, dict)):
                        yield from ((f"{key}.{own}", t) for own, t in leaf.named_parameters())


def captured_state(loss: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """What a loss finds in its variables, its modules and their attributes, to notice changes.

    Numbers and texts by value, also as attributes of an object; everything else by identity. States
    can be compared as long as the objects exist, which are the second result.
    """
    state: list[Any] = [_function_of(loss)]
    objects: list[Any] = [loss]
    for _, value in _variables(loss, set()):
        leaves = (value,) if isinstance(value, nn.Module) else pytree.tree_leaves(value)
        for leaf in leaves:
            objects.append(leaf)
            if isinstance(leaf, nn.Module):
                for module in leaf.modules():
                    objects.append(_add_module(state, module))
            else:
                state.append(_value(leaf))
                if type(leaf).__module__ not in _OPAQUE and not isinstance(leaf, _NOT_OBJECTS):
                    attributes = list(getattr(leaf, "__dict__", {}).values())
                    objects.append(attributes)
                    state += map(_value, pytree.tree_leaves(attributes))
    return tuple(state), objects


def _function_of(loss: Any) -> Any:
    """Equal for losses that differ only in their variables."""
    if isinstance(loss, ModuleLoss):
        return id(loss.model), id(loss.criterion)
    return id(getattr(loss, "__code__", loss))


_NOT_OBJECTS = (type, ModuleType, FunctionType, MethodType, partial, ModuleLoss)
_OPAQUE = ("torch", "torch.nn.parameter", "builtins")
_PLAIN = (int, float, complex, str, type(None))
# Entries of every module, and lists of its parameters that recurrent modules keep.
_OWN = frozenset(vars(nn.Module())) - {"training"} | {"_flat_weights", "_flat_weight_refs"}


def _add_module(state: list[Any], module: nn.Module) -> list[Any]:
    """Add the state of a module; returns the objects that it refers to."""
    kind, entries = type(module), vars(module)
    hooks = *entries["_forward_hooks"].values(), *entries["_forward_pre_hooks"].values()
    tensors = *entries["_parameters"].values(), *entries["_buffers"].values()
    values = [value for name, value in entries.items() if name not in _OWN]
    if not kind.__module__.startswith("torch."):
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            values += [value for name, value in vars(base).items() if not name.startswith("__")]
        values += [value for _, value in _variables(kind.forward, set())]
    state += (id(module), id(kind), *map(id, hooks))
    state += [(id(t), t is not None and t.requires_grad) for t in tensors]
    for value in values:
        if isinstance(value, (list, tuple, dict)):
            state += map(_value, pytree.tree_leaves(value))
        else:
            state.append(_value(value))
    return [module, kind, hooks, tensors, values]


def _value(leaf: Any) -> Any:
    return leaf if isinstance(leaf, _PLAIN) else id(leaf)


def captured_modules(loss: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name that a loss may call."""
    for name, value in _variables(loss, set()):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, nn.Module):
                for own, module in leaf.named_modules():
                    yield ".".join(part for part in (name, own) if part), module


def _variables(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Variables by name in which a function finds tensors, and those of functions among them.

    They are globals, those of its closure, defaults, and attributes of its object.
    """
    of_torch = str(getattr(function, "__module__", "")).startswith("torch.")
    if id(function) in seen or (of_torch and not isinstance(function, nn.Module)):
        return
    seen.add(id(function))
    found: dict[str, Any] = {}
    if isinstance(function, ModuleLoss):
        yield "", function.model
        yield from _variables(function.criterion, seen)
    elif isinstance(function, nn.Module):
        yield "", function
    elif isinstance(function, partial):
        found = {f"argument {k}": value for k, value in enumerate(function.args)}
        found |= function.keywords
        yield from _variables(function.func, seen)
    elif inspect.ismethod(function):
        yield from _variables(function.__self__, seen)
        yield from _variables(function.__func__, seen)
    elif inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        nested = _names_in(function.__code__.co_consts)
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is not parameter.empty
        }
        used = {name: function.__globals__[name] for name in nested & function.__globals__.keys()}
        found = {**used, **variables.globals, **variables.nonlocals, **defaults}
    else:
        found = dict(getattr(function, "__dict__", {}))
    for name, value in found.items():
        yield name, value
        if inspect.isroutine(value) or isinstance(value, (partial, ModuleLoss)):
            yield from _variables(value, seen)


def _names_in(constants: tuple[Any, ...]) -> set[str]:
    """The names that functions in a function's code use, such as lambdas and generators."""
    names: set[str] = set()
    for code in constants:
        if inspect.iscode(code):
            names |= {*code.co_names, *_names_in(code.co_consts)}
    return names


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (", ..." if len(unique) > 3 else "")
