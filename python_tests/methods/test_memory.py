"""Peak memory of a meta-gradient does not depend on the number of solver steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from imaml_ext import ConjugateGradient, GradientDescent, implicit_meta_grad, module_loss
from imaml_ext.experiments.build import build
from imaml_ext.experiments.models import conv4
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.reproduce import memory


def peak_of(device, curvature, inner_steps, cg_steps):
    """Peak allocated bytes during one meta-gradient, as counted by torch."""
    torch.manual_seed(0)
    model = conv4(5, filters=16).to(device)
    loss = module_loss(model, nn.functional.cross_entropy)
    x, y = torch.rand(4, 10, 1, 28, 28, device=device), torch.arange(5).repeat(4, 2).to(device)

    lam = 0.3 if curvature == "ggn" else 50.0  # positive definite, but CG does not converge early

    def run():
        return implicit_meta_grad(
            loss, dict(model.named_parameters()), (x, y), (x, y), lam=lam,
            inner=GradientDescent(lr=0.001, steps=inner_steps),
            linear=ConjugateGradient(max_iter=cg_steps, curvature=curvature),
        )  # fmt: skip

    results = []
    peak = memory.peak_bytes(lambda: results.append(run()), device)
    out = results[-1]
    assert (out.linear.steps == cg_steps).all()  # no early stop
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_peak_memory_does_not_grow_with_inner_or_cg_steps(curvature, device):
    base = peak_of(device, curvature, 1, 1)
    assert base > 1_000_000
    assert peak_of(device, curvature, 64, 1) <= 1.02 * base
    assert peak_of(device, curvature, 1, 12) <= 1.02 * base


@pytest.mark.slow
def test_a_long_training_does_not_leak_memory():
    trainer = build(replace(PRESETS["sinusoid"], inner_steps=2, cg_steps=2)).trainer()
    for _ in range(50):
        trainer.step()
    memory.release_free_memory()
    before = memory.resident_bytes("VmRSS")
    for _ in range(150):
        trainer.step()
    memory.release_free_memory()
    row = 4 * trainer.method.layout.dim  # of one task; a leaked graph holds several for each of 25
    assert memory.resident_bytes("VmRSS") - before < 150 * row
