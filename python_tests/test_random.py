"""Random numbers are functions of seed, step, stream and task."""

import pytest
import torch

from imaml_ext._random import _GOLDEN, _MASK, _mix, random_bits, uniform

CPU = torch.device("cpu")


def test_random_bits_are_splitmix64():
    # The generator's published test vector: seed 1234567, first outputs of SplitMix64.
    state = 1234567
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [_mix((state + (k + 1) * _GOLDEN) & _MASK) for k in range(5)] == published
    bits = random_bits(3, 5, 7, range(2), (4,), CPU)
    key = 0
    for word in (3, 5, 7):
        key = _mix(key + word * _GOLDEN + _GOLDEN)
    want = [_mix((key + k * _GOLDEN) & _MASK) >> 1 for k in range(8)]
    assert bits.flatten().tolist() == want


def test_a_task_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(
        random_bits(1, 2, 3, range(8), (5,), CPU)[:3], random_bits(1, 2, 3, range(3), (5,), CPU)
    )


def test_seed_step_and_stream_all_matter():
    draws = [
        random_bits(*key, range(1), (4,), CPU).tolist()
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len({str(draw) for draw in draws}) == 4


@pytest.mark.parametrize("seed", [0, 7, 2**40, -3])
@pytest.mark.parametrize("step", [0, 1, 41, 12345678901])
@pytest.mark.parametrize("stream", [0, 2, 9])
def test_a_step_on_the_device_draws_the_same_bits(seed, step, stream, device):
    expected = random_bits(seed, step, stream, range(3), (2,), CPU)
    number = torch.tensor(step, device=device)
    assert torch.equal(random_bits(seed, number, stream, range(3), (2,), device).cpu(), expected)


def test_uniform_is_uniform():
    draws = uniform(0, 0, 0, range(100_000), (), CPU)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Kolmogorov-Smirnov, 0.1% level: 1.95 / sqrt(n)
    distance = (draws.sort().values - torch.linspace(0, 1, 100_000)).abs().max()
    assert distance < 1.95 / 100_000**0.5
