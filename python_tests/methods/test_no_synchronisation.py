"""No tensor value is read on the host from sampling the tasks to updating theta.

On the meta device tensors have shapes but no values: `.item()`, `.tolist()` and `bool(tensor)`
raise. Like CUDA, it is treated as a device on which reading is not free.
"""

import importlib

import pytest
import torch

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    MINRES,
    Adam,
    ConjugateGradient,
    External,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    ProximalStrength,
    Reptile,
    adapt,
    implicit_meta_grad,
    module_loss,
)
from imaml_ext.data import ImageEpisodes, Sinusoid
from imaml_ext.experiments.models import conv4, mlp
from imaml_ext.training.capture import no_capture
from imaml_ext.training.device_step import DeviceStep

META = torch.device("meta")


def test_reading_a_value_on_the_meta_device_raises():
    with pytest.raises(RuntimeError):
        bool(torch.zeros(3, device=META).any())


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
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
        linear=ConjugateGradient(max_iter=3, rtol=1e-3, curvature=curvature),
        nonfinite=nonfinite,
    )
    assert out.params["0.weight"].shape == (8, 1)
    assert out.lam["0.weight"].shape == (8, 1)
    assert out.failed.shape == (4,)


@pytest.mark.parametrize(
    "inner",
    [
        Adam(steps=2, tol=1e-3),
        HessianFree(steps=2, tol=1e-3),
        LBFGS(steps=3, tol=1e-3),
        External(lambda problem: problem.start()),
    ],
    ids=lambda inner: type(inner).__name__,
)
@pytest.mark.parametrize(
    "cg",
    [
        ConjugateGradient(preconditioner="jacobi"),
        MINRES(rtol=1e-3),
        NeumannSeries(rtol=1e-3),
    ],
    ids=lambda cg: type(cg).__name__,
)
@pytest.mark.parametrize("form", ["diagonal", "dense"])
def test_no_solver_synchronises(inner, cg, form):
    model = mlp(1, 8, 1).to(META)
    params = dict(model.named_parameters())
    batch = Sinusoid(tasks=4, device=META).sample(3)
    method = IMAML(
        module_loss(model, torch.nn.functional.mse_loss), params, inner=inner, linear=cg,
        lam=ProximalStrength(params, form=form), nonfinite="omit",
    )  # fmt: skip
    out = method.meta_gradient(batch)
    assert method.learned().keys() <= out.named().keys()


@pytest.mark.parametrize("kind", [MAML, FOMAML, Reptile])
def test_no_method_synchronises(kind):
    model = mlp(1, 8, 1).to(META)
    batch = Sinusoid(tasks=4, device=META).sample(3)
    loss = module_loss(model, torch.nn.functional.mse_loss)
    out = kind(loss, dict(model.named_parameters()), nonfinite="omit").meta_gradient(batch)
    assert out.failed.shape == (4,)


def test_adapt_and_its_backward_do_not_synchronise():
    model = conv4(5, filters=4).to(META)
    images = torch.empty(9, 4, 28, 28, dtype=torch.uint8, device=META)
    batch = ImageEpisodes(images, way=5, shot=1, query=2, tasks=3, rotate=True).sample(0)
    loss = module_loss(model, torch.nn.functional.cross_entropy)
    phi = adapt(loss, dict(model.named_parameters()), batch.support, lam=2.0)
    torch.func.vmap(loss)(phi, batch.query).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
@pytest.mark.parametrize("dataset", ["sinusoid", pytest.param("images", marks=pytest.mark.slow)])
def test_a_meta_step_does_not_synchronise_from_sampling_to_the_update(
    dataset, nonfinite, monkeypatch
):
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_: ["meta"])
    if dataset == "images":
        model, criterion = conv4(5, filters=4).to(META), torch.nn.functional.cross_entropy
        images = torch.empty(9, 4, 28, 28, dtype=torch.uint8, device=META)
        source = ImageEpisodes(images, way=5, shot=1, query=2, tasks=3, rotate=True)
    else:
        model, criterion = mlp(1, 8, 1).to(META), torch.nn.functional.mse_loss
        source = Sinusoid(tasks=4, device=META)
    loss = module_loss(model, criterion)
    method = IMAML(
        loss, dict(model.named_parameters()), inner=GradientDescent(steps=2), nonfinite=nonfinite
    )
    optimizer = torch.optim.Adam(method.learned().values(), lr=1e-3, capturable=True)
    names = ["loss", "support_loss", "query", "inner_residual"]
    names += ["linear_residual", "negative_curvature", "failed"]
    step = DeviceStep(
        method, source, optimizer, {"query": loss}, names=names, rows=5, capture=no_capture
    )
    for number in (0, 1, 7):
        step.run(number)
    assert all(state["step"].is_meta for state in optimizer.state.values())
    with pytest.raises(NotImplementedError):
        step.read(range(7, 8))
