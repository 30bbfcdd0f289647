"""The paper's networks."""

import pytest
import torch
from torch import nn

from imaml_ext.experiments.models import conv4, wide_conv4


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


@pytest.mark.parametrize(("channels", "image"), [(1, 28), (3, 32), (3, 84)])
def test_an_output_of_the_wide_network_depends_on_no_other_image(channels, image):
    model = wide_conv4(5, channels=channels, image=image)
    x = torch.rand(7, channels, image, image)
    model(x)  # in training, batch norm uses and keeps the statistics of the batch
    model.eval()
    outputs = model(x)
    assert outputs.shape == (7, 5)
    torch.testing.assert_close(model(x[:1]), outputs[:1])
