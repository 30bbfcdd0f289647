"""Random numbers as a function of (seed, step, task): stateless, and the same on every device.

A counter-based generator: SplitMix64's output function, applied to a key and a counter. Resuming,
sharding the tasks of a step over machines, or recording a step as a CUDA graph does not change the
numbers. In a recording the step is a tensor on the device, whose value is not read.

Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
"""

import math
from typing import overload

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


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
        step: an int, or a 0-d int64 tensor on `device`, with the same bits.
    """
    key: int | Tensor = 0
    for word in (seed, step, stream):
        key = _mix(_wrapped(key) + _wrapped(word * _wrapped(_GOLDEN) + _wrapped(_GOLDEN)))
    each = math.prod(shape)
    counter = torch.arange(tasks.start * each, tasks.stop * each, dtype=torch.int64, device=device)
    z = _mix(counter * _wrapped(_GOLDEN) + _wrapped(key))
    return _shift_right(z, 1).view(len(tasks), *shape)


def uniform(
    seed: int,
    step: int | Tensor,
    stream: int,
    tasks: range,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Uniform in [0, 1), float64 [len(tasks), *shape]; from `random_bits`."""
    bits = random_bits(seed, step, stream, tasks, shape, device)
    return (bits >> 10).double() * 2.0**-53


@overload
def _mix(z: int) -> int: ...
@overload
def _mix(z: Tensor) -> Tensor: ...
def _mix(z: int | Tensor) -> int | Tensor:
    """SplitMix64's output function, of 64 bits or of each entry of an int64 tensor."""
    if isinstance(z, Tensor):  # int64 arithmetic wraps around
        for shift, factor in _MIX:
            z = (z ^ _shift_right(z, shift)) * _wrapped(factor)
        return z
    z &= _MASK
    for shift, factor in _MIX:
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return z


@overload
def _wrapped(word: int) -> int: ...
@overload
def _wrapped(word: Tensor) -> Tensor: ...
def _wrapped(word: int | Tensor) -> int | Tensor:
    """An int as the int64 with the same 64 bits, a valid operand for a tensor."""
    if isinstance(word, Tensor):
        return word
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
