"""A proximal strength that can be learned, positive by construction."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from imaml_ext.flat import Lam, Layout, matrix_product

Form = Literal["scalar", "tensor", "diagonal", "dense"]


class ProximalStrength(nn.Module):
    """Λ as a function of parameters without bounds: `exp` of them, or `L L' + floor I` if dense.

    The floor, 1e-3 of the initial value, keeps a dense Λ definite in float32; logarithms count only
    within ±60. Weight decay pulls Λ to the identity, not to 0.

    Call it for Λ, in the graph of its parameters: `adapt(..., lam=strength())`, or hand it over as
    it is: `IMAML(..., lam=strength)`.

    Args:
        params: theta, {name: tensor}.
        initial: the value to begin with, times the identity.
        form: one number for all ("scalar"), for each parameter tensor ("tensor"), for each scalar
            ("diagonal"), or a matrix [D, D] ("dense": D(D+1)/2 numbers matter; for small D).

    Raises:
        ValueError: initial is not positive and finite, or there is no such form.
    """

    def __init__(
        self, params: Mapping[str, Tensor], initial: float = 1.0, *, form: Form = "scalar"
    ) -> None:
        super().__init__()
        if not (math.isfinite(initial) and initial > 0):
            raise ValueError(f"initial must be positive and finite, got {initial}")
        layout = Layout(params)
        self.form = form
        self._names = list(layout.shapes)

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=layout.dtype, device=layout.device)

        log = math.log(initial)
        self.log: nn.Parameter | nn.ParameterList
        if form == "scalar":
            self.log = nn.Parameter(full(log))
        elif form == "tensor":
            self.log = nn.ParameterList([full(log) for _ in self._names])
        elif form == "diagonal":
            self.log = nn.ParameterList([full(log, *s) for s in layout.shapes.values()])
        elif form == "dense":  # L is the strictly lower part and exp of the diagonal
            self._floor = 1e-3 * initial
            self.log = nn.Parameter(torch.diag(full(0.5 * math.log(0.999 * initial), layout.dim)))
        else:
            raise ValueError(
                f"form must be 'scalar', 'tensor', 'diagonal' or 'dense', got {form!r}"
            )

    def forward(self) -> Lam:
        """Λ as `implicit_meta_grad` takes it."""
        if isinstance(self.log, nn.ParameterList):
            return {name: _exp(log) for name, log in zip(self._names, self.log, strict=True)}
        if self.form == "scalar":
            return _exp(self.log)
        factor = self.log.tril(-1) + torch.diag(_exp(self.log.diagonal()))
        floor = torch.full_like(self.log[0], self._floor)
        return matrix_product(factor, factor.T) + torch.diag(floor)


def _exp(log: Tensor) -> Tensor:
    return log.clamp(-60, 60).exp()
