"""The values of many tensors, kept and put back by a few operators, however many tensors there are.

On an accelerator each operator costs a launch: tensor by tensor, those of a small network's
parameters and optimizer would take longer than the optimizer's step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Snapshot:
    """The values of tensors as they are now. Everything stays on the device.

    Args:
        tensors: of any shapes and dtypes, on one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
        self._groups = [(group, _joined(group)) for group in by_dtype.values()]

    def restore(self, *, unless: Tensor | None = None) -> None:
        """Write the values back, bit for bit.

        Args:
            unless: where this is true, 0-d bool on the device, the tensors keep what they hold now.
        """
        for tensors, values in self._groups:
            if unless is not None:
                values = torch.where(unless, _joined(tensors), values)
            parts = values.split([tensor.numel() for tensor in tensors])
            shaped = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(tensors, shaped)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
