"""Random numbers as a function of (seed, step, task): the same on every device, with no state.

A counter-based generator: SplitMix64's output function applied to a key and a counter. Resuming,
sharding the tasks of a step over machines, or recording a step as a CUDA graph cannot change what
is drawn.

Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def random_bits(
    seed: int, step: int, stream: int, tasks: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """63 random bits in each entry of an int64 tensor [tasks, *shape].

    Task i's entries do not depend on `tasks`. Different `stream`s are independent.
    """
    key = 0
    for word in (seed, step, stream):
        key = _mix(key + word * _GOLDEN + _GOLDEN)
    count = tasks
    for size in shape:
        count *= size
    z = torch.arange(count, dtype=torch.int64, device=device) * _signed(_GOLDEN) + _signed(key)
    for shift, factor in _MIX:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return _shift_right(z, 1).view(tasks, *shape)


def uniform(
    seed: int, step: int, stream: int, tasks: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Uniform in [0, 1), float64 [tasks, *shape]."""
    bits = random_bits(seed, step, stream, tasks, shape, device)
    return (bits >> 10).double() * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    for shift, factor in _MIX:
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return z


def _signed(word: int) -> int:
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
