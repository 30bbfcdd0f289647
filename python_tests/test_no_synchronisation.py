"""Nothing from the task batch to the meta-gradient reads a value back to the host.

The meta device has shapes but no values: whatever asks a tensor for its value, `.item()`,
`.tolist()`, `bool(tensor)`, raises there. And like CUDA it is not the CPU, where looking is free.
"""

import pytest
import torch

from imaml_ext import ConjugateGradient, GradientDescent, adapt, implicit_meta_grad, module_loss
from imaml_ext.data import ImageEpisodes, Sinusoid
from imaml_ext.models import conv4, mlp

META = torch.device("meta")


def test_the_meta_device_would_notice():
    with pytest.raises(RuntimeError):
        bool(torch.zeros(3, device=META).any())


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("nonfinite", ["refuse", "skip"])
def test_a_meta_gradient_does_not_synchronise(curvature, nonfinite):
    model = mlp(1, 8, 1).to(META)
    params = dict(model.named_parameters())
    batch = Sinusoid(tasks=4, device=META).sample(3)
    out = implicit_meta_grad(
        module_loss(model, torch.nn.functional.mse_loss),
        params,
        batch.support,
        batch.query,
        lam={name: torch.ones_like(t) for name, t in params.items()},
        inner=GradientDescent(lr=0.1, steps=4, momentum=0.9, tol=1e-3),
        cg=ConjugateGradient(max_iter=3, rtol=1e-3, curvature=curvature),
        nonfinite=nonfinite,
    )
    assert out.params["0.weight"].shape == (8, 1)
    assert out.lam["0.weight"].shape == (8, 1)
    assert out.failed.shape == (4,)


def test_adapt_and_its_backward_do_not_synchronise():
    model = conv4(5, filters=4).to(META)
    images = torch.empty(9, 4, 28, 28, dtype=torch.uint8, device=META)
    batch = ImageEpisodes(images, way=5, shot=1, query=2, tasks=3, rotate=True).sample(0)
    loss = module_loss(model, torch.nn.functional.cross_entropy)
    phi = adapt(loss, dict(model.named_parameters()), batch.support, lam=2.0)
    torch.func.vmap(loss)(phi, batch.query).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
