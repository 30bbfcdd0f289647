"""The precision of float32 on CUDA: that of matrix products, for cuDNN's layers too.

A curvature product in TF32 has three digits, and conjugate gradient makes fewer of them. PyTorch's
matrix products are IEEE float32 unless `torch.set_float32_matmul_precision` says otherwise, but
cuDNN's convolutions and recurrent layers are TF32 by default. Here that one setting holds for all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def one_precision(device: torch.device) -> Iterator[None]:
    """cuDNN's layers on this device compute as matrix products do. Not apart for each thread."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    layers = cudnn.conv, cudnn.rnn
    before = [layer.fp32_precision for layer in layers]
    chosen = torch.backends.cuda.matmul.fp32_precision
    for layer in layers:
        layer.fp32_precision = "tf32" if chosen == "tf32" else "ieee"
    try:
        yield
    finally:
        for layer, precision in zip(layers, before, strict=True):
            layer.fp32_precision = precision
