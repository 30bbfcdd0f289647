"""Random numbers as a function of (seed, step, task): stateless, and the same on every device.

A counter-based generator: SplitMix64's output function, applied to a key and a counter. Resuming,
sharding the tasks of a step over machines, or recording a step as a CUDA graph does not change the
numbers. In a recording the step is a tensor on the device, whose value is not read.

Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)


def _wrapped(word: T) -> T:
    """An int as the int64 with the same low 64 bits; the arithmetic of int64 tensors wraps."""
    if isinstance(word, Tensor):
        return word
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _wrapped(0x9E3779B97F4A7C15)
_MIX = ((30, _wrapped(0xBF58476D1CE4E5B9)), (27, _wrapped(0x94D049BB133111EB)), (31, 1))


def random_bits(
    seed: int,
    step: int | Tensor,
    stream: int,
    tasks: range,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """63 random bits in each entry of an int64 tensor [len(tasks), *shape].

    A task's entries do not depend on which other tasks are drawn. Streams are independent.

    Args:
        tasks: consecutive task numbers.
        step: an int, or a 0-d int64 tensor on `device`; both give the same bits.
    """
    key: Any = 0
    words: list[Any] = [seed, step, stream]
    for word in words:
        key = _mix(_wrapped(key + _wrapped(word * _GOLDEN + _GOLDEN)))
    each = math.prod(shape)
    counter = torch.arange(tasks.start * each, tasks.stop * each, dtype=torch.int64, device=device)
    bits: Tensor = _mix(counter * _GOLDEN + key)
    return _shift_right(bits, 1).view(len(tasks), *shape)


def uniform(bits: Tensor) -> Tensor:
    """Uniform in [0, 1), float64, from `random_bits`."""
    return (bits >> 10).double() * 2.0**-53


def _mix(z: T) -> T:
    """SplitMix64's output function, of an int64 or of each entry of an int64 tensor."""
    for shift, factor in _MIX:
        z = _wrapped((z ^ _shift_right(z, shift)) * factor)
    return z


def _shift_right(z: T, bits: int) -> T:
    """Logical shift; that of int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
