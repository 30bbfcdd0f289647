"""Few-shot Omniglot with a ridge head: its gradients, and the program on made-up characters."""

import math

import pytest
import torch
from torch import nn

from examples import load_example
from imaml_ext import ConjugateGradient, HessianFree
from imaml_ext.data import Omniglot


@pytest.fixture
def example():
    return load_example("omniglot_features")


def closed_form(learner, support, query_x, way):
    """The logits by the normal equations of ridge regression, one task at a time."""
    logits = []
    shots = support[1].shape[1]
    images = torch.cat([support[0], query_x], 1)
    features = learner.body(images.flatten(0, 1)).flatten(1).unflatten(0, images.shape[:2])
    features = features / math.sqrt(features.shape[-1])
    features = nn.functional.pad(features, (0, 1), value=1.0)  # the input of the bias
    initial = torch.cat([learner.weight, learner.bias[:, None]])
    for of_task, y in zip(features, support[1], strict=True):
        x, query = of_task[:shots], of_task[shots:]
        rest = torch.eye(way, dtype=x.dtype)[y] - x @ initial
        kernel = x @ x.T + learner.log_lam.exp() * torch.eye(shots, dtype=x.dtype)
        head = initial + x.T @ torch.linalg.solve(kernel, rest)
        logits.append(learner.log_s.exp() * query @ head)
    return torch.stack(logits)


def test_logits_and_gradients_are_those_of_ridge_regression_in_closed_form(example):
    learner = example.Learner((2, 3, 3, 4)).double()
    with torch.no_grad():
        learner.weight.normal_()
        learner.bias.fill_(0.3)
    learner.linear = ConjugateGradient(max_iter=100, rtol=1e-14)
    learner.inner = HessianFree(steps=1, linear=learner.linear, damping=0.0)
    support = torch.rand(2, 4, 1, 28, 28).double(), torch.arange(4).expand(2, -1)
    query_x, weights = torch.rand(2, 6, 1, 28, 28).double(), torch.randn(2, 6, 4).double()
    parameters = dict(learner.named_parameters())
    found = {}
    for name, logits in (("ours", learner), ("exact", lambda *of: closed_form(learner, *of))):
        z = logits(support, query_x, 4)
        gradients = torch.autograd.grad((weights * z).sum(), list(parameters.values()))
        found[name] = {"logits": z, **dict(zip(parameters, gradients, strict=True))}
    for name, exact in found["exact"].items():
        torch.testing.assert_close(found["ours"][name], exact, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.renders
def test_characters_that_were_not_in_the_training_are_recognised(example, monkeypatch, tmp_path):
    # Characters of 7 x 7 squares; a twentieth of the squares of a drawing are wrong.
    squares = torch.rand(1623, 1, 7, 7).gt(0.5) ^ torch.rand(1623, 20, 7, 7).lt(0.05)
    drawings = 255 * squares.to(torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    omniglot = Omniglot(drawings, [str(number) for number in range(1623)])
    monkeypatch.setattr(example, "load_omniglot", lambda root: omniglot)
    figure = tmp_path / "figure.png"
    arguments = ["--data", "none", "--small", "--seed", "0", "1", "--figure", str(figure)]
    result = example.main(arguments)
    assert result["5-way"] > 50  # by chance: 20
    assert result["20-way"] > 25  # by chance: 5
    assert figure.read_bytes().startswith(b"\x89PNG")
