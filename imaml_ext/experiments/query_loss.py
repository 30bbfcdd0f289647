"""A loss of the query set that differs from that of the support set."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext.problem.layout import Params
from imaml_ext.problem.module_loss import ModuleLoss


@dataclass(frozen=True)
class QueryLoss:
    """The mean of a loss over batches of a task's examples, with scaled outputs.

    Batch k has examples k, k + batches, k + 2 batches, ...: equally many of each class if the
    examples are sorted by class and `batches` divides the number of examples per class. With batch
    norm, training with several query images per class then normalises them as evaluation with one
    does.

    A scale above 1 makes up for outputs that a few inner steps leave small: without it, the
    meta-gradient mostly enlarges them, which does not change the predicted classes.

    Args:
        loss: its criterion is called with `scale` times the outputs.
        batches: number of batches.
        scale: factor of the outputs.
    """

    loss: ModuleLoss
    batches: int = 1
    scale: float = 1.0

    def __call__(self, params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        losses = []
        for k in range(self.batches):
            outputs = self.loss.outputs(params, x[k :: self.batches])
            losses.append(self.loss.criterion(self.scale * outputs, y[k :: self.batches]))
        return torch.stack(losses).mean()
