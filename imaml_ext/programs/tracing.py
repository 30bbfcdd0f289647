"""The graph of a function's operators."""

from collections.abc import Callable, Sequence
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext._tracing import recording
from imaml_ext.programs.operators import UnsupportedOperator

aten = torch.ops.aten


def trace(
    function: Callable[..., Any], examples: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of `function`, traced through autograd and vmap.

    Also returns the tensors that it uses besides its arguments; they are the last placeholders.

    Raises:
        UnsupportedOperator: the function reads the value of a tensor.
    """
    # Imported here because it takes a second.
    from torch.fx.experimental.proxy_tensor import make_fx

    def watched(*inputs: Tensor) -> Any:
        with _NoScalars():
            return function(*inputs)

    with _TRACING, recording(tracing=True), _NoValueReads():
        graph = make_fx(watched, decomposition_table=_decompositions())(*examples)
    captured = _lift_tensors(graph)
    graph.graph.eliminate_dead_code()
    return graph, captured


_DECOMPOSED = (
    aten._log_softmax, aten._log_softmax_backward_data, aten._softmax, aten._softmax_backward_data,
    aten.addcdiv, aten.addcmul, aten.addmm, aten.baddbmm, aten.binary_cross_entropy_with_logits,
    aten.celu, aten.clamp, aten.clamp_max, aten.clamp_min, aten.dot, aten.elu, aten.elu_backward,
    aten.gelu, aten.gelu_backward, aten.hardsigmoid, aten.hardsigmoid_backward, aten.hardswish,
    aten.hardswish_backward, aten.hardtanh, aten.hardtanh_backward, aten.huber_loss,
    aten.huber_loss_backward, aten.l1_loss, aten.leaky_relu, aten.leaky_relu_backward,
    aten.log_sigmoid_backward, aten.log_sigmoid_forward, aten.logsumexp, aten.masked_fill,
    aten.mish, aten.mish_backward, aten.mse_loss, aten.mse_loss_backward, aten.mv,
    aten.native_group_norm, aten.native_group_norm_backward, aten.native_layer_norm,
    aten.native_layer_norm_backward, aten.nll_loss2d_backward, aten.nll_loss2d_forward,
    aten.nll_loss_backward, aten.nll_loss_forward, aten.relu6, aten.rsub, aten.select_backward,
    aten.selu, aten.silu, aten.silu_backward, aten.slice_backward, aten.smooth_l1_loss,
    aten.smooth_l1_loss_backward, aten.softplus, aten.softplus_backward, aten.square, aten.stack,
    aten.std, aten.var, aten.var_mean,
)  # fmt: skip


@cache
def _decompositions() -> dict[Any, Any]:
    from torch._decomp import get_decompositions

    return {
        **get_decompositions(_DECOMPOSED),
        aten.cosh.default: lambda x: (x.exp() + (-x).exp()) / 2,
    }


_TRACING = RLock()  # make_fx patches modules of the process


class _NoScalars(TorchDispatchMode):
    """Refuse to read values of tensors in C++, as in `x[n]` with a tensor n."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is aten._local_scalar_dense.default:
            raise UnsupportedOperator("an operator that reads the value of a tensor")
        return function(*args, **(kwargs or {}))


class _NoValueReads(TorchFunctionMode):
    """Refuse to read values of tensors, which tracing would silently turn into constants."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _VALUE_READS:
            name = getattr(function, "__name__", str(function)).strip("_")
            raise UnsupportedOperator(f"{name} reads the value of a tensor")
        return function(*args, **(kwargs or {}))


_VALUE_READS = {
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
    *(torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose, torch.is_nonzero),
}


def _lift_tensors(graph: fx.GraphModule) -> list[Tensor]:
    """Make the graph's constant tensors and ranges placeholders after the others; return them."""
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, fx.Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        is_range = node.target is aten.arange.default
        if node.op != "get_attr" and not is_range:
            continue
        name = node.name if is_range else node.target
        if name not in inputs:
            value = node.target(*node.args, **node.kwargs) if is_range else getattr(graph, name)
            tensors[name] = value
            with graph.graph.inserting_after(last):
                last = inputs[name] = graph.graph.placeholder(name)
        node.replace_all_uses_with(inputs[name])
        graph.graph.erase_node(node)
    return list(tensors.values())
