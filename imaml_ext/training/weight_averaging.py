"""A moving average of the learned tensors, kept in the optimizer's state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from imaml_ext._checks import check_instance, check_range

_AVERAGE = "average"  # in the optimizer's state of each tensor
_DECAY = "average_decay"  # in each of its parameter groups


def average_weights(optimizer: Optimizer, decay: float) -> None:
    """Keep an exponential moving average of every tensor that the optimizer updates.

    After each step, `average <- decay average + (1 - decay) tensor`, from the tensor's value after
    the first step. The averages are part of the optimizer's state, so checkpoints contain
    them and a recorded meta-step updates them. Training itself does not change; `averaged` puts the
    averages in place of the tensors. A checkpoint with averages can only be loaded after this call
    with the same decay, and one without averages only without it.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        decay: in [0, 1).

    Raises:
        TypeError: `optimizer` is not an optimizer, or `decay` not a number.
        ValueError: `decay` is out of range, or the optimizer already keeps averages.

    Source: Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the
    moving average is that of `torch.optim.swa_utils.get_ema_multi_avg_fn`.
    """
    check_instance("optimizer", optimizer, Optimizer, "pass one of torch.optim")
    check_range("decay", decay, "[0, 1)")
    if any(kept is not None for kept in decays(optimizer.param_groups)):
        raise ValueError("the optimizer already keeps averages")
    for group in optimizer.param_groups:
        group[_DECAY] = decay
    optimizer.register_step_post_hook(_update)


@torch.no_grad()
def _update(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if tensor.grad is None:  # not updated; Adam creates its state only if there is none
                continue
            state = optimizer.state[tensor]
            if _AVERAGE in state:
                state[_AVERAGE].lerp_(tensor, 1 - group[_DECAY])
            else:
                state[_AVERAGE] = tensor.detach().clone()


def decays(groups: list[dict[str, Any]]) -> list[float | None]:
    """The decay of each parameter group; None if no averages are kept."""
    return [group.get(_DECAY) for group in groups]


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Context in which the tensors that the optimizer updates have the values of their averages.

    Without averages, nothing changes. Do not train inside the context.

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
