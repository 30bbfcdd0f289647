"""Outputs with batch norm's statistics of the support set."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imaml_ext.problem.layout import Params


class SupportStatistics:
    """A model's outputs for query examples, batch norm having seen the support examples alone.

    `outputs(params, support_x, query_x)`, for one task, maps [S, ...] and [N, ...] to [N, ...]; the
    output for a query example does not depend on the others, as it would with their statistics.

    Args:
        model: its batch norms normalise by the batch that they are given. It is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self._norms: list[_SupportNorm] = []
        for parent in list(self.model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    norm = _SupportNorm(child)
                    setattr(parent, name, norm)
                    self._norms.append(norm)

    def __call__(self, params: Params, support_x: Tensor, query_x: Tensor) -> Tensor:
        count = len(support_x)
        for norm in self._norms:
            norm.count = count
        outputs: Tensor = functional_call(self.model, params, (torch.cat([support_x, query_x]),))
        return outputs[count:]


class _SupportNorm(nn.Module):
    """Batch norm by the statistics of the first `count` examples, under the same names."""

    count: int

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias  # None where it is not affine

    def forward(self, x: Tensor) -> Tensor:
        others = [0, *range(2, x.dim())]
        seen = x[: self.count]
        mean = seen.mean(others, keepdim=True)
        scale = (seen.var(others, correction=0, keepdim=True) + self.eps).rsqrt()
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        x = (x - mean) * scale
        return x if self.bias is None else x + self.bias.view(per_channel)
