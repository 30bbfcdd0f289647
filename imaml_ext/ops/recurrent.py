"""Recurrent layers as loops over time: PyTorch cannot vmap its own, or differentiate them twice.

The forms of `torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu`, which `nn.LSTM`, `nn.GRU` and `nn.RNN`
call, and of their cells. The products of all time steps with the input's weights are one product.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from imaml_ext.ops.batching import call_with_tasks, is_only_transform
from imaml_ext.ops.linear import linear

State = tuple[Tensor, ...]  # h, and c of an LSTM, [..., N, H]


class _Weights(NamedTuple):
    """Weights of one layer and direction, with a task dimension or inside vmap."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None  # of an LSTM with projections


class _Kind(NamedTuple):
    """A recurrent layer; `step` maps the input's product [..., N, G], state and weights to h, c."""

    step: Callable[[Tensor, State, _Weights], State]
    merges_biases: bool = True  # both biases are added to the input's product
    states: int = 1

    def inputs(self, x: Tensor, weights: _Weights) -> Tensor:
        """The product of x [..., I] with the weights of the input, [..., G]."""
        bias = weights.b_ih
        if self.merges_biases and bias is not None and weights.b_hh is not None:
            bias = bias + weights.b_hh
        return _affine(x, weights.ih, bias)


def _affine(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, w, bias) if w.dim() == 3 else F.linear(x, w, bias)


def _plus_product(a: Tensor, h: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(a, h, w.mT) if w.dim() == 3 else torch.addmm(a, h, w.mT)


def _lstm_step(a: Tensor, state: State, weights: _Weights) -> State:
    h, c = state
    i, f, g, o = _plus_product(a, h, weights.hh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if weights.hr is None else _affine(h, weights.hr, None)), c


def _gru_step(a: Tensor, state: State, weights: _Weights) -> State:
    (h,) = state
    a_r, a_z, a_n = a.chunk(3, -1)
    b_r, b_z, b_n = _affine(h, weights.hh, weights.b_hh).chunk(3, -1)
    z = (a_z + b_z).sigmoid()
    n = (a_n + (a_r + b_r).sigmoid() * b_n).tanh()
    return (n + z * (h - n),)


def _rnn_step(
    a: Tensor, state: State, weights: _Weights, function: Callable[[Tensor], Tensor]
) -> State:
    return (function(_plus_product(a, state[0], weights.hh)),)


_LSTM = _Kind(_lstm_step, states=2)
_GRU = _Kind(_gru_step, merges_biases=False)
_TANH = _Kind(partial(_rnn_step, function=torch.tanh))
_RELU = _Kind(partial(_rnn_step, function=torch.relu))


# These have the signatures of the functions they replace.


def _layers(
    kind: _Kind,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The outputs of the last layer, and the last states of every layer and direction."""
    if not isinstance(has_biases, bool):  # the second signature, (data, batch_sizes, hx, ...)
        _refuse_packed()
    if input.shape[-2 if batch_first else -3] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    run = partial(
        _run_layers, kind, has_biases=has_biases, directions=2 if bidirectional else 1,
        dropout=dropout if train else 0.0, time=-2 if batch_first else -3, layers=num_layers,
    )  # fmt: skip
    return _call(run, input, *states, *params)


def _cell(
    kind: _Kind,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """The next state."""
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    shape = input.shape[0], w_hh.shape[-1]
    for state in states:
        if state.shape != shape:
            raise RuntimeError(f"hx must be of shape {list(shape)}, got {list(state.shape)}")

    def run(x: Tensor, *tensors: Any) -> State:
        weights = _Weights(*tensors[len(states) :])
        return kind.step(kind.inputs(x, weights), tensors[: len(states)], weights)

    after = _call(run, input, *states, w_ih, w_hh, b_ih, b_hh)
    return after[0] if isinstance(hx, Tensor) else after


def _call(run: Callable[..., State], *operands: Tensor | None) -> State:
    """`run(*operands)`, outside vmap if it is the only transform: it has many small operators."""
    if is_only_transform() and any(map(_is_batched, operands)):
        return call_with_tasks(run, *operands)  # type: ignore[no-any-return]
    return run(*operands)


def _is_batched(operand: Tensor | None) -> bool:
    return operand is not None and _functorch.is_batchedtensor(operand)


def _run_layers(
    kind: _Kind,
    x: Tensor,
    *tensors: Tensor,
    has_biases: bool,
    layers: int,
    directions: int,
    dropout: float,
    time: int,
) -> State:
    hx = [state.unbind(-3) for state in tensors[: kind.states]]
    params = tensors[kind.states :]
    count = len(params) // (layers * directions)  # of one layer and direction
    last: list[State] = []
    for layer in range(layers):
        if dropout and layer > 0:
            x = F.dropout(x, dropout)
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            ih, hh, *rest = params[k * count : (k + 1) * count]
            weights = _Weights(ih, hh, *(rest if has_biases else (None, None, *rest)))
            states, after = _run_layer(
                kind, x, tuple(h[k] for h in hx), weights, time, reverse=direction == 1
            )
            outputs.append(torch.stack(states, time))
            last.append(after)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    return x, *(torch.stack(each, -3) for each in zip(*last, strict=True))


def _run_layer(
    kind: _Kind, x: Tensor, state: State, weights: _Weights, time: int, *, reverse: bool
) -> tuple[list[Tensor], State]:
    """h after each step, in the order of time, and the state after the last one."""
    steps = kind.inputs(x, weights).unbind(time)
    outputs = []
    for a in reversed(steps) if reverse else steps:
        state = kind.step(a, state, weights)
        outputs.append(state[0])
    return outputs[::-1] if reverse else outputs, state


def _refuse_packed(*operands: Any) -> Any:
    raise RuntimeError(
        "packed sequences would have different shapes in different tasks: pad the sequences, and "
        "make the mask or the lengths part of the data, as in docs/your-model.md"
    )


def _data_ptr(tensor: Tensor) -> Any:
    """Keep `flatten_parameters`, called on CUDA, from arranging parameters for cuDNN.

    It would fail for parameters of a task, which have no data pointer. It leaves parameters as they
    are if their data pointers are equal.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _FLATTEN:
        frame = frame.f_back
    return None if frame is None else 0


_FLATTEN = nn.RNNBase.flatten_parameters.__code__

FORMS: dict[Any, Callable[..., Any]] = {
    torch.lstm: partial(_layers, _LSTM),
    torch.gru: partial(_layers, _GRU),
    torch.rnn_tanh: partial(_layers, _TANH),
    torch.rnn_relu: partial(_layers, _RELU),
    torch.lstm_cell: partial(_cell, _LSTM),
    torch.gru_cell: partial(_cell, _GRU),
    torch.rnn_tanh_cell: partial(_cell, _TANH),
    torch.rnn_relu_cell: partial(_cell, _RELU),
    torch._pack_padded_sequence: _refuse_packed,
    Tensor.data_ptr: _data_ptr,
}
