"""Linear layers with one set of weights per task, for x [B, ..., in] and weights [B, out, in]."""

import torch
from torch import Tensor


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """`x w' + bias` for every task, [B, ..., out]: one batched product.

    `vmap` decomposes the same into about 15 operators, each with a derivative.

    Args:
        bias: [B, out].
    """
    rows = x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    y = torch.bmm(rows, w.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, w.mT)
    return y if x.dim() == 3 else y.view(*x.shape[:-1], -1)
