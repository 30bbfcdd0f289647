"""Work of fixed shapes, traced once and compiled: on the CPU, where calling it is what takes time.

What a small network's meta-gradient computes takes less time than PyTorch takes to call the
thousands of operators that compute it. Traced through, autograd and vmap included, they are one
graph, which `torch.compile`'s compiler fuses into few kernels.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from imaml_ext.looking import recording

T = TypeVar("T")


def compiled(function: Callable[[], T], rehearse: Callable[[], Any]) -> Callable[[], T]:
    """`function`, compiled; a `Capture`. The tensors that it reads are read anew in each call.

    It must not write them, and what it returns must be a pytree whose numbers do not change.
    Compiling takes from seconds to minutes and needs a C++ compiler; torch keeps what it compiled
    in its cache, so that the next process is done sooner.

    Raises:
        RuntimeError: it cannot be traced; the message says why.
    """
    # Both take a second to import, which only a caller of this function is to pay for.
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    result: Any = None

    def tensors() -> list[Tensor]:
        nonlocal result
        result = function()
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    with recording():
        graph = make_fx(tensors)()
    operands = _lift_tensors(graph)
    with torch.no_grad():
        run: Any = compile_fx(graph, operands)
    leaves, structure = pytree.tree_flatten(result)

    def replay() -> T:
        with torch.no_grad():
            found = iter(run(*operands))
        return cast(
            T,
            pytree.tree_unflatten(
                [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
            ),
        )

    return replay


def _lift_tensors(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds: as constants they could be folded."""
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, fx.Node] = {}
    first = next(iter(graph.graph.nodes))
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in inputs:
            tensors[node.target] = getattr(graph, node.target).detach()
            with graph.graph.inserting_before(first):
                inputs[node.target] = graph.graph.placeholder(node.target)
        node.replace_all_uses_with(inputs[node.target])
        graph.graph.erase_node(node)
    for name in tensors:
        delattr(graph, name)
    graph.recompile()
    return list(tensors.values())
