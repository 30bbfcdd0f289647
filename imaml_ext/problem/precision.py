"""float32 precision on CUDA: cuDNN's layers use the setting of matrix products.

A curvature product in TF32 has about two correct digits. PyTorch's matrix products are IEEE float32
unless `torch.set_float32_matmul_precision` changes that, but cuDNN's convolutions and recurrent
layers are TF32 by default.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch

_cudnn: Any = torch.backends.cudnn
_NOTHING = nullcontext()


def one_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context in which cuDNN's layers have the precision of matrix products, in all threads."""
    return _one_precision() if device.type == "cuda" else _NOTHING


@contextmanager
def _one_precision() -> Iterator[None]:
    precisions = _precisions()
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    older = _older_setting()
    # torch.backends.cudnn.flags() reads the older setting, which must not contradict the newer.
    if older is not None:
        _cudnn.allow_tf32 = tf32
    _set_precisions(["tf32" if tf32 else "ieee"] * 2)
    try:
        yield
    finally:
        if older is not None:
            _cudnn.allow_tf32 = older
        _set_precisions(precisions)


def _precisions() -> list[str]:
    return [_cudnn.conv.fp32_precision, _cudnn.rnn.fp32_precision]


def _set_precisions(precisions: list[str]) -> None:
    _cudnn.conv.fp32_precision, _cudnn.rnn.fp32_precision = precisions


def _older_setting() -> bool | None:
    """`torch.backends.cudnn.allow_tf32`; None if the newer settings already contradict it."""
    _silence_deprecation()
    with suppress(RuntimeError):
        return bool(_cudnn.allow_tf32)
    return None


@cache
def _silence_deprecation() -> None:
    """Some versions of torch warn about the older setting, once per process."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        _cudnn.allow_tf32 = _cudnn.allow_tf32
