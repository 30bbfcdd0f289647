"""Linear layers with one set of weights per task, for x [B, ..., in] and weights [B, out, in]."""

import torch
from torch import Tensor

from imaml_ext._tracing import is_tracing


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """`x w' + bias` for every task, [B, ..., out]: one batched product.

    `vmap` decomposes the same into a dozen operators, most of which have a derivative.

    Args:
        bias: [B, out].
    """
    rows = x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    if bias is None:
        y = torch.bmm(rows, w.mT)
    elif is_tracing():  # a program adds it to the product
        y = torch.bmm(rows, w.mT) + bias.unsqueeze(1)
    else:
        y = torch.baddbmm(bias.unsqueeze(1), rows, w.mT)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], -1)
