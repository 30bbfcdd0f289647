"""The networks of the paper's experiments."""

from itertools import pairwise

from torch import nn


def conv4(way: int, *, channels: int = 1, filters: int = 64, image: int = 28) -> nn.Sequential:
    """Four blocks of 3x3 convolution (stride 2), batch norm and ReLU, then a linear layer.

    Maps [N, channels, image, image] to [N, way]. Batch norm uses the statistics of the batch that
    it is given, as in MAML and iMAML, so a query image's output depends on the whole query set.
    """
    layers: list[nn.Module] = []
    side = image
    for _ in range(4):
        layers += [
            nn.Conv2d(channels, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
        channels, side = filters, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side * side, way))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between: mlp(1, 40, 40, 1) is the sinusoid's."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
