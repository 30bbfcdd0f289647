"""Values kept to be restored: of many tensors, and of a learning rate schedule."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Snapshot:
    """The values of tensors at this moment. Everything stays on the device.

    The number of operators does not depend on the number of tensors: on an accelerator each costs a
    launch, and one per parameter would take longer than the optimizer's step.

    Args:
        tensors: any shapes and dtypes, on one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
        self._groups = [(group, _joined(group)) for group in by_dtype.values()]

    def restore(self, *, unless: Tensor | None = None) -> None:
        """Write the values back, bit for bit.

        Args:
            unless: 0-d bool on the device; if true, the tensors keep their current values.
        """
        for tensors, values in self._groups:
            if unless is not None:
                values = torch.where(unless, _joined(tensors), values)
            parts = values.split([tensor.numel() for tensor in tensors])
            shaped = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(tensors, shaped)


class ScheduleSnapshot:
    """The learning rates of an optimizer and the state of their scheduler at this moment."""

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        rates = [group["lr"] for group in optimizer.param_groups]
        self._rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        self._state = {} if scheduler is None else scheduler.state_dict()

    def restore(self) -> None:
        if self._scheduler is not None:
            self._scheduler.load_state_dict(self._state)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
