"""The paper's networks."""

import pytest
import torch
from torch import nn

from imaml_ext.experiments.models import conv4


@pytest.mark.parametrize(
    ("settings", "channels", "features"),
    [
        ({}, 1, 64 * 2 * 2),
        ({"channels": 3, "filters": 32, "image": 84, "pool": True}, 3, 32 * 5 * 5),
        ({"channels": 3, "filters": 32, "image": 32, "pool": True}, 3, 32 * 2 * 2),
    ],
)
def test_conv4_is_the_papers_network(settings, channels, features):
    model = conv4(5, **settings)
    image = settings.get("image", 28)
    assert model(torch.rand(7, channels, image, image)).shape == (7, 5)
    assert model[-1].in_features == features
    assert sum(isinstance(m, nn.Conv2d) for m in model) == 4
    assert sum(isinstance(m, nn.MaxPool2d) for m in model) == (4 if settings.get("pool") else 0)
