"""Small networks, each of which uses conv2d, batch_norm or relu in a different way."""

import torch
import torch.nn.functional as F
from torch import nn

from imaml_ext import module_loss
from imaml_ext.experiments.models import conv4
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective

TASKS = 3


class Residual(nn.Module):
    """Uses the result of the batch norm both before and after the ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(0, 1))
        self.norm = nn.BatchNorm2d(5, track_running_stats=False)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return (F.relu(y) * y.sigmoid()).flatten(1)


class OverwrittenBeforeReLU(Residual):
    """Overwrites the result of the batch norm before the ReLU."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        y.mul_(-1)
        return F.relu(y).flatten(1)


class Scaled(Residual):
    """Scales the result of the ReLU."""

    def forward(self, x):
        return (2 * F.relu(self.norm(self.conv(x)))).flatten(1)


class ScaledInPlace(Residual):
    """The same, in place. PyTorch's own ReLU does not allow this, since it saves its result."""

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))).mul_(2).flatten(1)


class View(nn.Module):
    """`view` needs memory in the order of the dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return torch.tanh(self.norm(self.conv(x))).view(x.shape[0], -1)


class OtherReLU(Residual):
    """The ReLU after the batch norm has another input."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return (F.relu(y) + z).flatten(1)


class TransformedReLU(Residual):
    """Applies the ReLU inside another transform."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.func.vmap(lambda row: F.relu(row).tanh())(y).flatten(1)


class OneByOne(Residual):
    """A vmap over examples inside the vmap over tasks."""

    def forward(self, x):
        return torch.func.vmap(lambda image: self.conv(image[None])[0].tanh())(x).flatten(1)


class RunningStatistics(Residual):
    """Batch norm by given statistics, not by those of the batch."""

    def forward(self, x):
        y = self.conv(x)
        mean, var = x.new_zeros(5), x.new_ones(5)
        y = F.batch_norm(y, mean, var, self.norm.weight, self.norm.bias, training=False)
        return y.flatten(1)


class OneExample(nn.Module):
    """The linear layer receives a vector, not a matrix."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x[0])) * self.layer(x).mean(0)


def norm_of(size, *dims):
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(dims) or 1]
    return kind(size, track_running_stats=False)


def convs(*modules):
    return nn.Sequential(*modules, nn.Flatten())


MODELS = {
    "conv4": (lambda: conv4(4, channels=2, filters=5, image=9), (2, 9, 9)),
    "pooling": (lambda: conv4(4, channels=2, filters=5, image=16, pool=True), (2, 16, 16)),
    "view": (View, (2, 4, 4)),
    "group norm": (lambda: convs(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU()), (2, 4, 4)),
    "relu of another input": (OtherReLU, (2, 5, 4)),
    "relu in a transform": (TransformedReLU, (2, 5, 4)),
    "examples one by one": (OneByOne, (2, 5, 4)),
    "running statistics": (RunningStatistics, (2, 5, 4)),
    "dilation of one": (lambda: convs(nn.Conv2d(2, 3, 2, dilation=(1, 2)), nn.Tanh()), (2, 4, 4)),
    "relu and sigmoid": (Residual, (2, 5, 4)),
    "scaled": (Scaled, (2, 5, 4)),
    "overwritten": (OverwrittenBeforeReLU, (2, 5, 4)),
    "relu in place": (
        lambda: convs(nn.Conv2d(2, 3, 2), norm_of(3, 1, 1), nn.ReLU(inplace=True)),
        (2, 4, 4),
    ),
    "tanh": (lambda: convs(nn.Conv2d(2, 3, 2, bias=False), norm_of(3, 1, 1), nn.Tanh()), (2, 4, 4)),
    "1d": (lambda: convs(nn.Linear(4, 6), norm_of(6), nn.ReLU()), (4,)),
    "linear": (
        lambda: convs(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), nn.Tanh()),
        (4,),
    ),
    "linear, 4-d": (lambda: convs(nn.Linear(4, 3), nn.Tanh()), (2, 3, 4)),
    "linear, strided": (
        lambda: convs(nn.Conv2d(2, 3, 2), nn.Linear(3, 2), nn.Tanh()),
        (2, 4, 4),
    ),
    "linear, 1-d": (OneExample, (4,)),
    "3d": (lambda: convs(nn.Conv3d(1, 3, 2), norm_of(3, 1, 1, 1), nn.ReLU()), (1, 3, 3, 3)),
    "groups": (lambda: convs(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh()), (4, 4, 4)),
    "dilation": (lambda: convs(nn.Conv2d(2, 3, 2, dilation=2), nn.Tanh()), (2, 4, 4)),
    "same": (lambda: convs(nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh()), (2, 4, 4)),
    "reflected": (
        lambda: convs(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh()),
        (2, 4, 4),
    ),
    "not affine": (
        lambda: convs(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, affine=False, track_running_stats=False)
        ),
        (2, 4, 4),
    ),
}


def make_objective(name, frozen=(), device="cpu"):
    build, shape = MODELS[name]
    model = build().double().to(device)
    params = {n: p for n, p in model.named_parameters() if n not in frozen}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    layout = Layout(params)
    rows = layout.flatten(params).detach() + 0.1 * torch.randn(TASKS, layout.dim).double().to(
        device
    )
    data = tuple(torch.randn(TASKS, 6, *s).double().to(device) for s in (shape, (1,)))
    loss = module_loss(model, lambda z, y: (z.pow(3) * y).mean())
    return Objective(loss, layout, data), rows
