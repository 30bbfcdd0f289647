"""Which layer PyTorch could not batch or differentiate, and what to do about it.

PyTorch names an operator. Here the layer is found that called it: an error in the forward pass has
it in its traceback; one in a derivative has not, so each layer is differentiated by itself, once
there is an error.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.func import functional_call, vmap
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
)
from torch.utils import _pytree as pytree


class Cause(NamedTuple):
    """What an error says."""

    failure: str  # continues "the layer ..."
    operator: str | None
    in_backward: bool


_ONCE = "has no derivative in PyTorch"
_TWICE = "has no second derivative in PyTorch"
_WRONG = "has a second derivative in PyTorch that is wrong"
_VMAP = "cannot be vmapped by PyTorch"
_VALUE = "looks at a value, and there is one for each task"
_SHARED = "writes what tasks share"

# What torch says, what that means, and whether it says so in a backward pass; group 1 is the
# operator.
_MESSAGES = [
    (r"derivative for '?([\w:.]+)'? is not implemented", _TWICE, True),
    (r"marked with @once_differentiable(?:: ([\w:.]+))?", _TWICE, True),
    (r"wrong derivative: (\w+)", _WRONG, True),
    (r"Batching rule not implemented for ([\w:]+\.out);", _SHARED, False),
    (r"Batching rule not implemented for ([\w:.]+?)[;.]? ", _VMAP, False),
    (r"In order to use an autograd.Function with functorch", _VMAP, False),
    (r"You tried to vmap over (\w+), but it does not have vmap", _VMAP, False),
    (r"^vmap: It looks like", _VALUE, False),
    (r"^vmap: (\S+)\(.*is not possible", _SHARED, False),
    (r"^output with shape .* doesn't match the broadcast shape", _SHARED, False),
    (r"batched tensor as input while the running_mean", _SHARED, False),
]

# What to do, by operator; the first that matches.
_REMEDIES = [
    (
        r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention",
        "run it, and the backward pass of adapt, under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    ),
    (
        r"native_multi_head_attention|transformer_encoder_layer_fwd",
        "call torch.backends.mha.set_fastpath_enabled(False)",
    ),
    (r"_cudnn_rnn", "run it under torch.backends.cudnn.flags(enabled=False)"),
    (
        r"(::|_)(lstm|gru|rnn)",
        "write the recurrence out, as docs/your-model.md does; if its parameters are frozen, "
        "compute its outputs before and let them be the data",
    ),
    (
        r"WeightNorm",
        "register a parametrization of its own, v, g -> g * v / v.norm(dim=1, keepdim=True)",
    ),
    (r"_embedding_bag", "take nn.Embedding, and the sum or mean over the bag"),
    (r"_cdist|_pdist", "write the distances out, or take compute_mode='use_mm_for_euclid_dist'"),
]

_OTHERWISE = {
    _WRONG: "write it in other operators",
    _ONCE: "write it in operators that PyTorch differentiates",
    _TWICE: "write it in operators that PyTorch differentiates twice",
    _VMAP: "write it in operators that PyTorch vmaps",
    _VALUE: "use torch.where",
    _SHARED: "track no running statistics, call eval(), or write a new tensor",
}


def title(name: str, module: nn.Module) -> str:
    """How messages call a module."""
    kind = type(module).__name__
    return f"{name} ({kind})" if name else kind


def cause_of(error: RuntimeError) -> Cause | None:
    """What the error says; None for one that is not about batching or differentiating."""
    for pattern, failure, in_backward in _MESSAGES:
        found = re.search(pattern, str(error))
        if found is not None:
            operator = found[1] if found.re.groups else None
            if failure == _TWICE and operator and "backward" not in operator.lower():
                failure = _ONCE
            return Cause(failure, operator, in_backward)
    return None


def explain(error: RuntimeError, example: Callable[[], Tensor]) -> str | None:
    """One line that names the layer and the remedy; None for an error that says it itself.

    Args:
        example: the loss of one task, without vmap, in the graph of its parameters.
    """
    cause = cause_of(error)
    if cause is None:
        return None
    layer = _failing_layer(example) if cause.in_backward else _layer_in(error.__traceback__)
    operator = "" if cause.operator is None else f" ({cause.operator})"
    text = f"{layer or 'the loss'} {cause.failure}{operator}: {remedy(cause)}"
    if cause.failure == _SHARED:  # or it is a mistake about shapes
        text += f" ({str(error).partition(chr(10))[0]})"
    if cause.failure in (_TWICE, _WRONG):
        text += ", or take a method that needs none, FOMAML or Reptile"
    return text


def remedy(cause: Cause) -> str:
    for pattern, text in _REMEDIES:
        if cause.operator is not None and re.search(pattern, cause.operator):
            return text
    return _OTHERWISE[cause.failure]


def check_differentiable_twice(outputs: Tensor, inputs: Tensor) -> None:
    """Raises RuntimeError where a second derivative would be zero or wrong without a word.

    Looks at no more than `_MOST_NODES` of the graph: torch frees nodes that Python has seen one
    inside the other, and tens of thousands of them exhaust the stack.

    Weight norm's takes the norm for a constant (torch 2.13). What lies behind a Function marked
    once_differentiable looks unused to a gradient that is asked for by its inputs, and inside vmap
    the mark is lost altogether.
    """
    end: Any = torch.autograd.graph.get_gradient_edge(inputs).node
    for node in _nodes(outputs.grad_fn, end):
        if type(node).__name__ == "WeightNormInterfaceBackward0":
            raise RuntimeError(f"wrong derivative: {type(node).__name__}")
        if isinstance(node, BackwardCFunction) and _is_marked(type(node)._forward_cls, set()):  # type: ignore[attr-defined]
            below = (other for n in _nodes(node, end) for other, _ in n.next_functions)
            if end in below:
                raise RuntimeError(f"marked with @once_differentiable: {type(node).__name__}")


_MOST_NODES = 3000


def _nodes(start: Any, end: Any) -> Iterator[Any]:
    """The graph below a node, itself included, up to `end`."""
    stack, seen = [start], {None, end}
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += [below for below, _ in node.next_functions]


_MARK = once_differentiable(lambda ctx: None).__code__


def _is_marked(function: Any, seen: set[Any]) -> bool:
    """Whether the Function's backward is once_differentiable; vmap's holds it in a closure."""
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


def _layer_in(traceback: TracebackType | None) -> str | None:
    """The innermost module under way when the error was raised."""
    under_way: list[nn.Module] = []
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            under_way.append(owner)
        traceback = traceback.tb_next
    return _name(under_way[0], under_way[-1]) if under_way else None


def _failing_layer(example: Callable[[], Tensor]) -> str | None:
    """The first module, inner ones before those that hold them, that lacks a derivative."""
    failing: list[nn.Module] = []
    callers: list[nn.Module] = []
    busy = False

    def after(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        nonlocal busy
        if busy:
            return
        callers.append(module)  # the last is the outermost
        if failing:
            return
        busy = True
        try:
            if not _has_derivatives(module, args, kwargs):
                failing.append(module)
        finally:
            busy = False

    handle = register_module_forward_hook(after, with_kwargs=True)
    try:
        with torch.enable_grad():
            example()
    finally:
        handle.remove()
        _global_forward_hooks_with_kwargs.pop(handle.id, None)  # which torch 2.13 leaves there
    return _name(callers[-1], failing[0]) if failing else None


def _has_derivatives(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether PyTorch has the first and the second, under vmap, where a layer may run otherwise."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if _is_floating(leaf)]
    params = dict(module.named_parameters())
    inputs = [leaves[place] for place in places] + list(params.values())
    inputs = [t.detach()[None].requires_grad_() for t in inputs]

    def forward(*inputs: Tensor) -> list[Tensor]:
        given = dict(enumerate(leaves)) | dict(zip(places, inputs, strict=False))
        args, kwargs = pytree.tree_unflatten(list(given.values()), structure)
        own = dict(zip(params, inputs[len(places) :], strict=True))
        outputs = functional_call(module, own, args, kwargs)
        return [t for t in pytree.tree_leaves(outputs) if _is_floating(t)]

    try:
        slopes = _slopes(vmap(forward, randomness="different")(*inputs), inputs)
        _slopes(slopes, inputs)
    except RuntimeError as error:
        cause = cause_of(error)
        return cause is None or not cause.in_backward
    return True


def _slopes(outputs: Sequence[Any], inputs: list[Tensor]) -> list[Tensor]:
    values = [t.square().sum() for t in outputs if _is_floating(t) and t.requires_grad]
    if not values:
        return []
    total = torch.stack(values).sum()
    for t in inputs:
        check_differentiable_twice(total, t)
    slopes = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    return [slope for slope in slopes if slope is not None]


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _name(root: nn.Module, module: nn.Module) -> str:
    names = (name for name, other in root.named_modules() if other is module)
    return title(next(names, ""), module)
