"""Work of fixed shapes, traced once and compiled: on the CPU, where calling it is what takes time.

What a small network's meta-gradient computes takes less time than PyTorch takes to call the
thousands of operators that compute it. Traced through, autograd and vmap included, they are one
graph, which `torch.compile`'s compiler fuses into few kernels.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from imaml_ext._tracing import T, recording


def compiled(function: Callable[[], T], warmup: Callable[[], Any]) -> Callable[[], T]:
    """`function`, compiled; a `Capture`. The tensors that it reads are read anew in each call.

    It must not write them, and what it returns must be a pytree whose numbers do not change.
    Compiling takes from seconds to minutes and needs a C++ compiler; torch keeps the result in its
    cache, so that the next process is done sooner. It is compiled anew when the number of threads,
    autocast or another global setting of torch changes.

    Args:
        function, warmup: as in `Capture`; nothing is warmed_up.

    Raises:
        RuntimeError: it cannot be traced or compiled; the message says why.
    """
    # A second to import, which only a caller of this function is to pay for.
    from torch.fx.experimental.proxy_tensor import make_fx

    result: Any = None

    def tensors() -> list[Tensor]:
        nonlocal result
        with _Blind():
            result = function()
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    with recording(tracing=True):
        graph = make_fx(tensors)()
    read = _lift_tensors(graph)
    operands = [tensor.detach() for tensor in read]
    # One C++ function: called from Python, the small kernels would take longer than they run.
    options: Any = {"cpp_wrapper": True}
    run: Any = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    with torch.no_grad():
        run(*operands)
    leaves, structure = pytree.tree_flatten(result)

    def replay() -> T:
        for tensor, operand in zip(read, operands, strict=True):
            if tensor.data_ptr() != operand.data_ptr():
                raise RuntimeError(
                    f"a tensor of shape {list(tensor.shape)} has other memory than when it was "
                    "recorded, as after .data = or .to(): write it in place, or record anew"
                )
        with torch.no_grad():
            found = iter(run(*operands))
        values = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cast(T, pytree.tree_unflatten(values, structure))

    return replay


class _Blind(TorchFunctionMode):
    """Nothing looks at a value: of a tensor that exists already tracing would make a constant."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _LOOKS:
            raise RuntimeError(
                f"{getattr(function, '__name__', function)} looks at a value: what is decided by "
                "it would be decided for every replay"
            )
        return function(*args, **(kwargs or {}))


_LOOKS = {
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
    *(torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose, torch.is_nonzero),
}


def _lift_tensors(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds: as constants they could be folded."""
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
