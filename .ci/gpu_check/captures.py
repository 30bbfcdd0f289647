"""Checks of meta-gradients and training, captured and eager."""

import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from imaml_ext import (
    IMAML,
    ConjugateGradient,
    GradientDescent,
    RecordedMetaGradient,
    Trainer,
    implicit_meta_grad,
    module_loss,
)
from imaml_ext.data import Sinusoid
from imaml_ext.experiments.models import conv4, mlp
from imaml_ext.training.capture import cuda_graph, no_capture

STEPS = 6
Call = Callable[[], Tensor]


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm()).item()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def agreed(error: float, tolerance: float) -> str:
    assert error <= tolerance, f"they differ by {error:.1e}, tolerance {tolerance:.0e}"
    return f"they differ by {error:.1e}"


def sinusoid_method(device: torch.device, *, dense: bool = False) -> IMAML:
    torch.manual_seed(0)
    model = mlp(1, 8, 1).to(device)
    params = dict(model.named_parameters())
    lam: Any = 2.0
    if dense:
        size = sum(parameter.numel() for parameter in params.values())
        factor = torch.randn(size, size, device=device) / size
        lam = 2 * torch.eye(size, device=device) + factor @ factor.T
    return IMAML(
        module_loss(model, nn.functional.mse_loss), params, lam=lam,
        inner=GradientDescent(lr=0.05, steps=4), linear=ConjugateGradient(3, curvature="ggn"),
    )  # fmt: skip


def recorded_meta_gradient(device: torch.device) -> str:
    """A captured meta-gradient, replayed on batches that it was not captured with."""
    method, source = sinusoid_method(device), Sinusoid(tasks=16, device=device)
    record = RecordedMetaGradient(method.meta_gradient, source.sample(0))
    errors = []
    for number in range(3):
        batch = source.sample(number)
        want = flat(method.meta_gradient(batch).params).clone()
        errors.append(relative(flat(record(batch).params), want))
    return agreed(max(errors), 1e-5)


def trained(device: torch.device, *, dense: bool, record: bool) -> Tensor:
    on_cuda = device.type == "cuda"
    method = sinusoid_method(device, dense=dense)
    capture = no_capture if on_cuda and not record else None
    trainer = Trainer(method, Sinusoid(tasks=8, device=device), capture=capture)
    for _ in range(STEPS):
        trainer.step()
    assert len(trainer.history) == STEPS
    return flat(method.params)


def training(device: torch.device, *, dense: bool = False) -> str:
    """Captured meta-steps give the same parameters as eager ones."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        got = trained(device, dense=dense, record=True)
    messages = "; ".join(str(warning.message) for warning in warned)
    # A factorisation may not be capturable; then a warning states that the steps run eagerly.
    assert dense or not messages, messages
    want = trained(device, dense=dense, record=False)
    return ", and warn: ".join(filter(None, [agreed(relative(got, want), 1e-4), messages]))


def training_with_a_dense_lam(device: torch.device) -> str:
    return training(device, dense=True)


def conv4_in_float64(device: torch.device) -> str:
    """The meta-gradient of the paper's network agrees with the CPU's, in both forms of CUDA."""
    torch.manual_seed(0)
    model = conv4(5).double()
    images = torch.rand(2, 3, 5, 1, 28, 28, dtype=torch.float64)
    labels = torch.arange(5).expand(3, -1)

    def on(where: torch.device) -> Tensor:
        model.to(where)
        x, query, y = images[0].to(where), images[1].to(where), labels.to(where)
        out = implicit_meta_grad(
            module_loss(model, nn.functional.cross_entropy), dict(model.named_parameters()),
            (x, y), (query, y), lam=50.0, inner=GradientDescent(lr=0.01, steps=4),
            linear=ConjugateGradient(3),
        )  # fmt: skip
        return flat(out.params).cpu()

    want, errors = on(torch.device("cpu")), []
    for form in ("patches", "products"):
        with mock.patch.dict(os.environ, IMAML_LAYERS=form):
            errors.append(relative(on(device), want))
    return agreed(max(errors), 1e-9)


def conv4_twice(device: torch.device) -> str:
    """Two runs in float32 give the same bits: the order of every sum is fixed."""
    torch.manual_seed(0)
    model = conv4(5).to(device)
    images = torch.rand(2, 3, 5, 1, 28, 28).to(device)
    labels = torch.arange(5, device=device).expand(3, -1)
    loss, params = module_loss(model, nn.functional.cross_entropy), dict(model.named_parameters())

    def once() -> Tensor:
        out = implicit_meta_grad(
            loss, params, (images[0], labels), (images[1], labels), lam=50.0,
            inner=GradientDescent(lr=0.01, steps=4), linear=ConjugateGradient(3),
        )  # fmt: skip
        return flat(out.params)

    first, second = once(), once()
    assert torch.equal(first, second), f"they differ by {relative(first, second):.1e}"
    return "the same bits"


# Products of conv4's layers 1 to 4 in the forward pass, and in the gradients of images and weights.
PRODUCTS = (("forward", False, True), ("images", False, False), ("weights", True, False))


def products(device: torch.device) -> str:
    """Compares batched_product with torch.bmm, and channel_sums with sum: results, and times."""
    found = []
    for tasks, images in ((16, 5), (16, 20), (4, 100)):
        for layer, pixels in enumerate((196, 49, 16, 4), start=1):
            rows, terms = images * pixels, 9 if layer == 1 else 576
            patches, output, weight = (
                torch.rand(tasks, *size, device=device) - 0.5
                for size in ((rows, terms), (rows, 64), (64, terms))
            )
            operands = {
                "forward": (patches, weight), "images": (output, weight),
                "weights": (output, patches),
            }  # fmt: skip
            times = []
            for name, transpose_a, transpose_b in PRODUCTS:
                a, b = operands[name]
                times.append(f"{name} " + compared(
                    partial(torch.ops.imaml.batched_product, a, b, transpose_a, transpose_b),
                    partial(torch.bmm, a.mT if transpose_a else a, b.mT if transpose_b else b),
                ))  # fmt: skip
            sums = partial(torch.ops.imaml.channel_sums, output)
            times.append("sums " + compared(sums, partial(output.sum, 1)))
            found.append(f"{tasks} tasks, {images} images, layer {layer}: {', '.join(times)}")
    return "microseconds, own / PyTorch's\n  " + "\n  ".join(found)


def compared(own: Call, other: Call) -> str:
    agreed(relative(own(), other()), 1e-5)
    return f"{microseconds(own):.1f} / {microseconds(other):.1f}"


def microseconds(call: Call, calls: int = 20) -> float:
    """Of a call in a CUDA graph of `calls`; on the CPU of one call."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    def all_calls() -> list[Tensor]:
        return [call() for _ in range(calls)]

    replay = cuda_graph(all_calls, all_calls)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / calls


CHECKS = {
    "a recorded meta-gradient equals the eager one": recorded_meta_gradient,
    "conv4's meta-gradient in float64 equals the CPU's": conv4_in_float64,
    "conv4's meta-gradient is deterministic": conv4_twice,
    "own products and sums equal PyTorch's": products,
    "captured training equals eager training": training,
    "captured training with a dense lam equals eager training": training_with_a_dense_lam,
}
