"""Random numbers are functions of seed, step, stream and task."""

import pytest
import torch

from imaml_ext._random import random_bits, uniform

CPU = torch.device("cpu")


def splitmix64(state, outputs):
    """The first outputs for this state, in Python's integers."""
    for k in range(1, outputs + 1):
        z = (state + k * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        yield z ^ z >> 31


def test_random_bits_are_splitmix64():
    # The generator's published test vector: seed 1234567, first outputs of SplitMix64.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert list(splitmix64(1234567, 5)) == published
    bits = random_bits(3, 5, 7, range(2), (4,), CPU)
    key = 0
    for word in (3, 5, 7):
        (key,) = splitmix64(key + word * 0x9E3779B97F4A7C15, 1)
    # The counter starts at 0.
    want = [z >> 1 for z in splitmix64(key - 0x9E3779B97F4A7C15, 8)]
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
    draws = uniform(random_bits(0, 0, 0, range(100_000), (), CPU))
    assert draws.min() >= 0
    assert draws.max() < 1
    # Kolmogorov-Smirnov, 0.1% level: 1.95 / sqrt(n)
    distance = (draws.sort().values - torch.linspace(0, 1, 100_000)).abs().max()
    assert distance < 1.95 / 100_000**0.5
