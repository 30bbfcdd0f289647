"""A moving average of the learned tensors, kept in the optimizer's state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from imaml_ext._checks import check_instance, check_range

_AVERAGE = "average"  # name in the state of each tensor


def average_weights(optimizer: Optimizer, decay: float) -> None:
    """Keep an exponential moving average of every tensor that the optimizer updates.

    After each step, `average <- decay average + (1 - decay) tensor`, from the tensor's value after
    the first step. The averages are part of the optimizer's state, so checkpoints contain
    them and a recorded meta-step updates them. Training itself does not change; `averaged` puts the
    averages in place of the tensors.

    Args:
        optimizer: any `torch.optim.Optimizer`; a second call adds a second update per step.
        decay: in [0, 1).

    Raises:
        TypeError: `optimizer` is not an optimizer, or `decay` not a number.
        ValueError: `decay` is out of range.

    Source: Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the
        moving average is that of `torch.optim.swa_utils.get_ema_multi_avg_fn`.
    """
    check_instance("optimizer", optimizer, Optimizer, "pass one of torch.optim")
    check_range("decay", decay, "[0, 1)")

    @torch.no_grad()
    def update(optimizer: Optimizer, *_: Any) -> None:
        for tensor, state in optimizer.state.items():
            if _AVERAGE in state:
                state[_AVERAGE].lerp_(tensor, 1 - decay)
            else:
                state[_AVERAGE] = tensor.detach().clone()

    optimizer.register_step_post_hook(update)


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Context in which the tensors that the optimizer updates have the values of their averages.

    Without averages, nothing changes. Training must not go on inside the context.

    Args:
        optimizer: as in `average_weights`.
    """
    values = averages(optimizer)
    before = {tensor: tensor.detach().clone() for tensor in values}
    _copy(values)
    try:
        yield
    finally:
        _copy(before)


def averages(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """The average of each tensor that has one."""
    return {t: state[_AVERAGE] for t, state in optimizer.state.items() if _AVERAGE in state}


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)
