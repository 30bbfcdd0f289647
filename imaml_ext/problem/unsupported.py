"""Layers that PyTorch cannot vmap or differentiate twice: detection, and messages with a remedy."""

import re
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, once_differentiable

_ONCE = "has no derivative in PyTorch"
_TWICE = "has no second derivative in PyTorch"
_WRONG = "has a wrong second derivative in PyTorch"
_VMAP = "cannot be vmapped by PyTorch"
_VALUE = "depends on the value of a tensor, which differs between tasks"
_SHAPE = "selects elements by value, so that shapes would differ between tasks"
_SHARED = "writes to a tensor that all tasks share"
_RANDOM = "draws random numbers into a tensor that all tasks share"
_HOOK = "registers a hook on a tensor, which vmap does not support"
_STALE = "uses a tensor that an earlier evaluation stored outside of the model"
_CHECKPOINT = "runs under activation checkpointing, which vmap does not support"
_AUTOGRAD = "calls autograd.grad, backward or requires_grad_, which vmap does not support"
_VALIDATED = "creates a distribution that checks the values of its arguments"

# Messages of PyTorch and their meaning; group 1 is the operator.
_FAILURES = [
    (r"derivative for '?([\w:.]+)'? is not implemented", _TWICE),
    (r"marked with @once_differentiable(?:: ([\w:.]+))?", _TWICE),
    (r"wrong derivative: (\w+)", _WRONG),
    (r"Batching rule not implemented for ([\w:]+\.out);", _SHARED),
    (r"Batching rule not implemented for ([\w:.]+?)[;.]? ", _VMAP),
    (r"In order to use an autograd.Function with functorch", _VMAP),
    (r"You tried to vmap over (\w+), but it does not have vmap", _VMAP),
    (r"^vmap: we do not yet support ([\w:]+)", _VMAP),
    (r"^vmap: It looks like", _VALUE),
    (r"^Cannot access data pointer of Tensor", _VALUE),
    (r"^vmap: .* output dynamic shape. Attempted to vmap over ([\w:]+)", _SHAPE),
    (r"^vmap: .*(boolean mask|masked_select)", _SHAPE),
    (r"^vmap: inplace arithmetic\(.*is not possible", _SHARED),
    (r"^vmap: (\S+)\(.*is not possible", _SHARED),
    (r"^output with shape .* doesn't match the broadcast shape", _SHARED),
    (r"batched tensor as input while the running_mean", _SHARED),
    (r"^vmap: Cannot ask for different inplace randomness", _RANDOM),
    (r"^cannot register a hook on a tensor", _HOOK),
    (r"^You are attempting to call Tensor.requires_grad_", _AUTOGRAD),
    (r"^backward\(\) called inside a functorch transform", _AUTOGRAD),
    (r"^element \d+ of tensors does not require grad", _AUTOGRAD),
    (r"escaped from inside a function being vmapped", _STALE),
]

# The same errors where they are raised by a file of PyTorch.
_BY_FILE = [
    ("torch/utils/checkpoint.py", (_VMAP, _STALE), _CHECKPOINT),
    ("torch/distributions/", (_VALUE,), _VALIDATED),
]

# Remedies by operator, then by failure; the first match is used.
_REMEDIES = [
    (
        r"WeightNorm",
        "register a parametrization that computes v, g -> g * v / v.norm(dim=1, keepdim=True)",
    ),
    (r"_embedding_bag", "use nn.Embedding, and the sum or mean over the bag"),
    (r"_cdist|_pdist", "write out the distances, or use compute_mode='use_mm_for_euclid_dist'"),
    (_WRONG, "use other operators"),
    (_ONCE, "use operators that PyTorch differentiates"),
    (_TWICE, "use operators that PyTorch differentiates twice"),
    (_VMAP, "use operators that PyTorch can vmap"),
    (_VALUE, "keep it a tensor, without item(), numpy() or if, and use torch.where"),
    (
        _SHAPE,
        "keep all elements, and weight them or use torch.where: (losses * mask).sum() / mask.sum()",
    ),
    (
        _SHARED,
        "track no running statistics, call eval(), or create the tensor from one of the task, by "
        "x.new_zeros(...) or torch.zeros_like(x)",
    ),
    (_RANDOM, "use torch.randn or rand, or create the tensor by torch.empty"),
    (_HOOK, "use an autograd.Function with generate_vmap_rule=True"),
    (_STALE, "use what forward returns, not what a hook stores"),
    (_CHECKPOINT, "call the block itself; for less memory, pass fewer tasks at a time"),
    (_AUTOGRAD, "use torch.func.grad, jacrev or hessian"),
    (_VALIDATED, "pass validate_args=False"),
]


def unsupported_layer_message(error: RuntimeError) -> str | None:
    """One line with the layer or operator and a remedy; None if the error has another cause."""
    matches = ((re.search(pattern, str(error)), failure) for pattern, failure in _FAILURES)
    found, failure = next((match for match in matches if match[0]), (None, ""))
    if found is None:
        return None
    operator = found[1] if found.re.groups else None
    files = [frame.f_code.co_filename for frame in _frames(error.__traceback__)]
    for folder, failures, meaning in _BY_FILE:
        if failure in failures and any(folder in file.replace("\\", "/") for file in files):
            failure, operator = meaning, None
    if failure == _TWICE and operator and "backward" not in operator.lower():
        failure = _ONCE
    what = f"{failure} ({operator})" if operator else failure
    remedy = next(text for pattern, text in _REMEDIES if re.search(pattern, what))
    message = f"{innermost_layer(error.__traceback__) or 'the loss'} {what}: {remedy}"
    if str(error).startswith("output with shape"):  # the shapes may also be wrong
        message += f" ({str(error).splitlines()[0]})"
    if failure in (_TWICE, _WRONG):
        message += ", or use a first-order method, FOMAML or Reptile"
    return message


def layer_name(name: str, module: nn.Module) -> str:
    """How messages name a module."""
    kind = type(module).__name__
    return f"{name} ({kind})" if name else kind


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def innermost_layer(traceback: TracebackType | None) -> str | None:
    """The innermost module whose forward raised the error; None in a backward pass."""
    owners = [frame.f_locals.get("self") for frame in _frames(traceback)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    if not modules:
        return None
    names = (name for name, other in modules[0].named_modules() if other is modules[-1])
    return layer_name(next(names, ""), modules[-1])


MOST_NODES = 10_000
_MARK = once_differentiable(lambda ctx: None).__code__


def check_differentiable_twice(outputs: Tensor, inputs: Tensor) -> None:
    """Raises RuntimeError where a second derivative would silently be zero or wrong.

    That of weight norm treats the norm as a constant (torch 2.13). The backward pass of a Function
    marked once_differentiable is not connected to the inputs, so that its derivative is zero and
    no error is raised; inside vmap the mark is lost.

    At most `MOST_NODES` nodes of the graph are searched.
    """
    end: Any = torch.autograd.graph.get_gradient_edge(inputs).node
    for node in graph_nodes(outputs.grad_fn, end):
        if type(node).__name__ == "WeightNormInterfaceBackward0":
            raise RuntimeError(f"wrong derivative: {type(node).__name__}")
        marked = isinstance(node, BackwardCFunction) and _is_marked(type(node)._forward_cls, set())  # type: ignore[attr-defined]
        if marked and end in graph_nodes(node, end):
            raise RuntimeError(f"marked with @once_differentiable: {type(node).__name__}")


def graph_nodes(start: Any, end: Any) -> Iterator[Any]:
    """The graph of a node down to `end`, with both; at most `MOST_NODES` nodes.

    Torch frees nodes with Python wrappers recursively: tens of thousands overflow the stack.
    """
    stack, seen = [start], {None}
    while stack and len(seen) < MOST_NODES:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if node is not end:
                stack += [below for below, _ in node.next_functions]


def _is_marked(function: Any, seen: set[Any]) -> bool:
    """Whether a Function's backward is once_differentiable; vmap's holds it in a closure."""
    seen.add(function)
    backward = function.backward
    while backward is not None:
        if getattr(backward, "__code__", None) is _MARK:
            return True
        for cell in getattr(backward, "__closure__", None) or ():
            held = cell.cell_contents
            if isinstance(held, type) and issubclass(held, Function) and held not in seen:
                return _is_marked(held, seen)
        backward = getattr(backward, "__wrapped__", None)
    return False
