"""Attention from products and a softmax: PyTorch cannot differentiate its fused kernels twice."""

import math
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`softmax(scale Q K' + mask) V`; 0 where all keys are masked.

    The form of `torch.nn.functional.scaled_dot_product_attention`, with its signature; None to call
    the original, which raises the error.
    """
    if attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, *_FLOATS)):
        return None
    if enable_gqa:
        heads = query.shape[-3]
        if heads % key.shape[-3] or heads % value.shape[-3]:
            return None
        key = key.repeat_interleave(heads // key.shape[-3], -3)
        value = value.repeat_interleave(heads // value.shape[-3], -3)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores = (query * scale) @ key.mT
    if is_causal:
        rows, columns = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        scores = torch.where(rows[:, None] >= columns, scores, -torch.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    if attn_mask is None or key.shape[-2] == 0:
        weights = scores.softmax(-1)
    else:
        # Also replaced before the softmax, whose derivative would be NaN.
        is_masked = scores.detach().amax(-1, keepdim=True) == -torch.inf
        weights = torch.where(is_masked, 0.0, scores).softmax(-1)
        weights = torch.where(is_masked, 0.0, weights)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# torch dispatches the function itself to a mode of torch functions, and runs it without the mode.
# This one is not dispatched, but what it calls is.
multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
