"""The networks of the paper's experiments."""

from itertools import pairwise

from torch import nn


def conv4(
    way: int, *, channels: int = 1, filters: int = 64, image: int = 28, pool: bool = False
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm and ReLU, then a linear layer.

    Maps [N, channels, image, image] to [N, way]. Batch norm uses the statistics of its input batch,
    as in MAML and iMAML, so the output for a query image depends on the whole query set.

    Args:
        way: number of classes.
        channels: channels of the images.
        filters: filters of each convolution.
        image: height and width of the images in pixels.
        pool: whether to halve the image by 2x2 max pooling, as for Mini-ImageNet, or by a stride of
            2 in the convolutions, as for Omniglot.

    Source: Vinyals et al. 2016, as in Finn, Abbeel, Levine 2017.
    """
    layers: list[nn.Module] = []
    side = image
    for _ in range(4):
        layers += [
            nn.Conv2d(channels, filters, 3, stride=1 if pool else 2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
        if pool:
            layers.append(nn.MaxPool2d(2))
        channels, side = filters, side // 2 if pool else (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side * side, way))


def wide_conv4(way: int, *, channels: int = 1, image: int = 28) -> nn.Sequential:
    """Four blocks of 32 to 128 filters, then a linear layer.

    As `conv4`, but each block halves the image before it is normalised, and batch norm keeps
    running statistics: in evaluation, the output for an image does not depend on any other.

    Args:
        way, channels, image: as in `conv4`.
    """
    layers: list[nn.Module] = []
    for filters in (32, 64, 96, 128):
        layers += [
            nn.Conv2d(channels, filters, 3, padding=1, bias=False),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.BatchNorm2d(filters, momentum=0.02),
            nn.ReLU(),
        ]
        channels, image = filters, (image + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * image * image, way))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU in between; `mlp(1, 40, 40, 1)` is the network for sinusoids.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
