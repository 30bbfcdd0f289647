"""A query set that is evaluated in several batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss


@dataclass(frozen=True)
class QueryBatches:
    """The mean of a loss over `count` batches of a task's examples.

    Batch k has examples k, k + count, k + 2 count, ...: equally many of each class if the examples
    are sorted by class, and `count` divides their number. With batch norm, a training that uses
    several query images per class then normalises them as an evaluation that uses one.
    """

    loss: ModuleLoss
    count: int

    def __call__(self, params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        batches = [(x[k :: self.count], y[k :: self.count]) for k in range(self.count)]
        return torch.stack([self.loss(params, batch) for batch in batches]).mean()
