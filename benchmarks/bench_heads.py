"""What does a meta-step cost, part by part, if only a head is adapted?

Omniglot-sized tasks, 20-way 1-shot with 5 query images per class, and a body of four convolutions.
With `adapt`, the head is ridge regression on features that the body computes once, outside of the
inner problem. With ANIL, `implicit_meta_grad(shared=body)`, the body is inside the loss, so that
each evaluation of the loss includes its forward pass. Parts are timed within whole meta-steps. The
share of the arithmetic, in multiply-adds of convolutions and matrix products, is what a part's
share of the time would be if all of these ran at the same rate and nothing else took time.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import parser, provenance, report, synchronize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imaml_ext import ConjugateGradient, HessianFree, adapt, implicit_meta_grad, module_loss
from imaml_ext.problem.objective import Matvec
from imaml_ext.problem.proximal import Proximal
from imaml_ext.solvers.solution import Solution

WAY, QUERY = 20, 5
LAM = 0.1


class Parts:
    """Seconds, or multiply-adds, of each part of a meta-step."""

    def __init__(self, device: torch.device, counting: bool = False) -> None:
        self.device, self.counting = device, counting
        self.spent: dict[str, float] = {}
        self._inside: list[float] = []  # of the parts within the current one

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time within the parts inside of this one is not counted as this one's."""
        synchronize(self.device)
        self._inside.append(0.0)
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            yield
        synchronize(self.device)
        ...
