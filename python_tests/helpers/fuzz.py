"""Shared by the property-based tests: a count of inputs, and random tensors."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

tried: Counter[str] = Counter()  # inputs by the name of the function; rejected ones do not count

GUARD = 5  # elements before and after a tensor inside a larger one


@dataclass
class Tensors:
    """Tensors by name, and the contents of their memory before a call."""

    by_name: dict[str, Any]
    _before: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def remember(self) -> None:
        self._before = [(name, t, memory(t).clone()) for name, t in self._in_memory()]

    def changed(self, *, but: dict[str, torch.Tensor] | None = None) -> list[str]:
        """Names of tensors whose memory has changed, except within the tensors in `but`."""
        names = []
        for name, tensor, before in self._before:
            now = memory(tensor).clone()
            for written in (but or {}).values():
                if written.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    first = written.storage_offset() * written.element_size()
                    last = first + written.numel() * written.element_size()
                    now[first:last] = before[first:last]
            if not torch.equal(now, before):
                names.append(name)
        return names

    def _in_memory(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (name, t)
            for name, t in self.by_name.items()
            if isinstance(t, torch.Tensor) and t.device.type != "meta"
        ]


def memory(t: torch.Tensor) -> torch.Tensor:
    """Every byte of a tensor's storage, including bytes outside of the tensor."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


# Kinds of values: mostly those of a training, sometimes unusual or invalid ones.
VARIANTS = ["normal"] * 6 + ["zeros", "equal", "huge", "tiny", "spotted"]


def filled(shape, dtype, *, variant, seed, device="cpu", inside=True):
    """A contiguous tensor, in the middle of a larger one if `inside`."""
    generator = torch.Generator().manual_seed(seed)
    numel = 1
    for size in shape:
        numel *= size
    values = torch.randn(numel, generator=generator, dtype=torch.float64)
    if variant == "zeros":
        values.zero_()
    elif variant == "equal":
        values.fill_(1.5)
    elif variant in ("huge", "tiny"):
        exponent = 25 if dtype == torch.float32 else 90
        values *= 10.0 ** (exponent if variant == "huge" else -exponent)
    elif variant == "spotted" and numel:
        where = torch.randint(numel, (3,), generator=generator)
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
        values[where] = odd[torch.randint(3, (3,), generator=generator)]
    guard = GUARD if inside else 0
    buffer = torch.full((numel + 2 * guard,), 7.0).to(device, dtype)
    tensor = buffer[guard : guard + numel]
    tensor.copy_(values)
    return tensor.view(shape)


seeds = st.integers(0, 2**31)
variants = st.sampled_from(VARIANTS)


def sampled(*values):
    return st.sampled_from(values)
