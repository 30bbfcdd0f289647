"""The networks of the paper's experiments."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imaml_ext.flat import Params


def conv4(
    way: int, *, channels: int = 1, filters: int = 64, image: int = 28, pool: bool = False
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm and ReLU, then a linear layer.

    Maps [N, channels, image, image] to [N, way]. Batch norm uses the statistics of the batch that
    it is given, as in MAML and iMAML, so a query image's output depends on the whole query set.

    Args:
        way: outputs, one for each class.
        channels: of the images.
        filters: of each convolution.
        image: height and width, pixels.
        pool: halve the image by 2x2 max pooling, as for Mini-ImageNet; without, by a stride of 2 in
            the convolutions, as for Omniglot.

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


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between: `mlp(1, 40, 40, 1)` is the sinusoid's.

    Args:
        sizes: of the input, of each hidden layer, and of the output.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SupportStatistics:
    """A model's outputs for query examples, batch norm having seen the support examples alone.

    `outputs(params, support_x, query_x)`, for one task, maps [S, ...] and [N, ...] to [N, ...]; the
    output for a query example does not depend on the others, as it would with their statistics.

    Args:
        model: its batch norms normalise by the batch that they are given. It is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self._norms: list[_SupportNorm] = []
        for parent in list(self.model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    norm = _SupportNorm(child)
                    setattr(parent, name, norm)
                    self._norms.append(norm)

    def __call__(self, params: Params, support_x: Tensor, query_x: Tensor) -> Tensor:
        count = len(support_x)
        for norm in self._norms:
            norm.count = count
        outputs: Tensor = functional_call(self.model, params, (torch.cat([support_x, query_x]),))
        return outputs[count:]


class _SupportNorm(nn.Module):
    """Batch norm by the statistics of the first `count` examples, under the same names."""

    count: int

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias  # None where it is not affine

    def forward(self, x: Tensor) -> Tensor:
        others = [0, *range(2, x.dim())]
        seen = x[: self.count]
        mean = seen.mean(others, keepdim=True)
        scale = (seen.var(others, correction=0, keepdim=True) + self.eps).rsqrt()
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        x = (x - mean) * scale
        return x if self.bias is None else x + self.bias.view(per_channel)
