"""Compiling work of fixed shapes, which removes the cost of calling operators on the CPU.

In the meta-gradient of a small network, PyTorch's overhead for thousands of operators exceeds their
arithmetic. Traced through autograd and vmap they form one graph, which `torch.compile`'s backend
fuses into a few kernels.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from imaml_ext._tracing import T, recording


def compiled(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """`function`, compiled; a `Capture`. Every call reads the current values of its tensors.

    `function` must not write tensors that exist before the call, and must return a pytree; numbers
    in it are frozen. Compiling takes from seconds to minutes and needs a C++ compiler; torch caches
    the result on disk. It recompiles when the number of threads, autocast or another global setting
    of torch changes.

    Args:
        function, warmup: as in `Capture`; `warmup` is not called.

    Raises:
        RuntimeError: it cannot be traced or compiled; the message has the cause.
    """
    # Imported here because it takes a second.
    from torch.fx.experimental.proxy_tensor import make_fx

    result: Any = None

    def tensors() -> list[Tensor]:
        nonlocal result
        with _NoValueReads():
            result = function()
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    with recording(tracing=True):
        graph = make_fx(tensors)()
    read = _lift_tensors(graph)
    operands = [tensor.detach() for tensor in read]
    # One C++ function, since calling small kernels from Python takes longer than running them.
    options: Any = {"cpp_wrapper": True}
    run: Any = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    with torch.no_grad():
        run(*operands)
    leaves, structure = pytree.tree_flatten(result)

    def replay() -> T:
        for tensor, operand in zip(read, operands, strict=True):
            if tensor.data_ptr() != operand.data_ptr():
                raise RuntimeError(
                    f"a tensor of shape {list(tensor.shape)} was reallocated after recording, for "
                    "example by .data = or .to(); write it in place, or record again"
                )
        with torch.no_grad():
            outputs = iter(run(*operands))
        values = [next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cast(T, pytree.tree_unflatten(values, structure))

    return replay


class _NoValueReads(TorchFunctionMode):
    """Refuse to read values of tensors, which tracing would silently turn into constants."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _VALUE_READS:
            raise RuntimeError(
                f"{getattr(function, '__name__', function)} reads the value of a tensor, which "
                "would be the same in every replay; compute with tensors instead"
            )
        return function(*args, **(kwargs or {}))


_VALUE_READS = {
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
    *(torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose, torch.is_nonzero),
}


def _lift_tensors(graph: fx.GraphModule) -> list[Tensor]:
    """Turn the graph's constant tensors, which could be folded, into inputs; return them."""
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, fx.Node] = {}
    first = next(iter(graph.graph.nodes))
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in inputs:
            tensors[node.target] = getattr(graph, node.target)
            with graph.graph.inserting_before(first):
                inputs[node.target] = graph.graph.placeholder(node.target)
        node.replace_all_uses_with(inputs[node.target])
        graph.graph.erase_node(node)
    for name in tensors:
        delattr(graph, name)
    graph.recompile()
    return list(tensors.values())
