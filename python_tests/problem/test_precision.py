"""On CUDA, cuDNN's layers use IEEE float32 in every pass, unless the user chose TF32.

The settings exist in every build of torch, and take effect on a GPU.
"""

import contextlib

import pytest
import torch
from torch import nn

from imaml_ext import MAML, ConjugateGradient, GradientDescent, implicit_meta_grad, module_loss
from imaml_ext.data import Sinusoid
from imaml_ext.problem import differentiation
from imaml_ext.problem.precision import one_precision

CUDA = torch.device("cuda")
LAYERS = torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def precisions():
    return [layer.fp32_precision for layer in LAYERS]


def choose(*values):
    for layer, value in zip(LAYERS, values, strict=True):
        layer.fp32_precision = value


@pytest.fixture(autouse=True)
def _settings():
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    choose(*before)


@pytest.mark.parametrize(("chosen", "expected"), [("highest", "ieee"), ("high", "tf32")])
@pytest.mark.parametrize("before", [["tf32", "tf32"], ["ieee", "tf32"], ["ieee", "ieee"]])
def test_cudnns_layers_have_the_precision_of_matrix_products(chosen, expected, before):
    choose(*before)
    torch.set_float32_matmul_precision(chosen)
    with one_precision(CUDA):
        assert precisions() == [expected, expected]
    assert precisions() == before


def test_cudnn_can_be_disabled_inside_a_loss():
    # flags() reads the older setting, which raises if the newer settings contradict it.
    with one_precision(CUDA), torch.backends.cudnn.flags(enabled=False):
        assert not torch.backends.cudnn.enabled
    assert precisions() == ["tf32", "tf32"]


def test_the_settings_are_restored_after_an_error():
    with pytest.raises(KeyError), one_precision(CUDA):
        raise KeyError
    assert precisions() == ["tf32", "tf32"]
    assert torch.backends.cudnn.allow_tf32  # the older setting


def test_on_the_cpu_no_setting_is_changed():
    with one_precision(torch.device("cpu")):
        assert precisions() == ["tf32", "tf32"]


class Probe(torch.autograd.Function):
    """The identity; calls `note` when it or one of its derivatives is computed."""

    @staticmethod
    def forward(x, note):
        note()
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.note = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return Probe.apply(g, ctx.note), None

    @staticmethod
    def vmap(info, in_dims, x, note):
        return Probe.apply(x, note), in_dims[0]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_every_pass_of_a_meta_gradient_runs_in_the_context(curvature, monkeypatch):
    inside, seen = [], []

    @contextlib.contextmanager
    def noted(device):
        inside.append(device)
        yield
        inside.pop()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            return Probe.apply(self.layer(x), lambda: seen.append(bool(inside)))

    monkeypatch.setattr(differentiation, "one_precision", noted)
    model = Model()
    loss, params = module_loss(model, nn.functional.mse_loss), dict(model.named_parameters())
    batch, inner = Sinusoid(tasks=2).sample(0), GradientDescent(lr=0.01, steps=2)
    cg = ConjugateGradient(max_iter=2, curvature=curvature)
    implicit_meta_grad(loss, params, batch.support, batch.query, lam=1.0, inner=inner, linear=cg)
    passes = len(seen)
    MAML(loss, params, inner=inner).meta_gradient(batch)
    assert passes >= 2 * 2 + 2 + 2 + 2  # inner steps, query, linearisation, products
    assert len(seen) > passes
    assert all(seen)
