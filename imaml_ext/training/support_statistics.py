"""Outputs of a model whose batch norms use the statistics of the support set."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imaml_ext._checks import check_instance
from imaml_ext.problem.layout import Params


class SupportStatistics:
    """A model's outputs for query examples, with batch norm statistics of the support examples.

    `outputs(params, support_x, query_x)`, for one task, maps [S, ...] and [N, ...] to [N, ...]. The
    output for a query example does not depend on the other query examples.

    Args:
        model: its batch norms use batch statistics. It is copied, not changed.

    Raises:
        TypeError: it is not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        check_instance("model", model, nn.Module, "pass the model, not its outputs")
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
    """Batch norm with the statistics of the first `count` examples; same parameter names."""

    count: int

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias  # None if not affine

    def forward(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.dim())]
        support = x[: self.count]
        mean = support.mean(axes, keepdim=True)
        scale = (support.var(axes, correction=0, keepdim=True) + self.eps).rsqrt()
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        x = (x - mean) * scale
        return x if self.bias is None else x + self.bias.view(per_channel)
