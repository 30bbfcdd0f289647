"""Λ as an operator on rows: scalar, diagonal or dense, or a scalar or a diagonal for each task.

The values alone, by their number of dimensions, determine the kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class LamOperator(ABC):
    """Λ_i of each task i as a symmetric matrix that acts on its row of [B, D].

    Attributes:
        values: [1] for a scalar, [D] for a diagonal, [D, D] for a dense matrix, the same for all
            tasks; [B, 1, 1] for a scalar per task, [B, 1, D] for a diagonal per task.
        fused: the part of Λ that the fused kernels apply, [1] or [D]; 0 if PyTorch applies Λ.
        is_fused: whether the kernels apply Λ.
    """

    is_fused = False

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.fused = values if self.is_fused else values.new_zeros(1)

    @staticmethod
    def of(values: Tensor) -> "LamOperator":
        """The operator with these `values`."""
        kinds: tuple[type[LamOperator], ...] = (SharedLam, _Dense, _PerTask)
        return kinds[values.dim() - 1](values)

    @abstractmethod
    def mv(self, rows: Tensor) -> Tensor:
        """`Λ_i rows_i` for every row, [B, D]."""

    def add_unfused(self, rows: Tensor, phi: Tensor, theta: Tensor | None = None) -> Tensor:
        """`rows + Λ (phi - theta)`, or `rows` where the kernels add the product."""
        if self.is_fused:
            return rows
        return rows + self.mv(phi if theta is None else phi - theta)

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """`Λ_i^-1 rows_i` for every row, [B, D]; 0 where Λ is not positive (definite)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """[1], [D], [B, 1] or [B, D]."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The norm of its entries, float64: 0-d, or [B] per task."""

    def is_valid(self) -> Tensor:
        """Whether it is positive definite, or the scalar 0 (no proximal term): bool as `norm`."""
        return self.is_positive_definite()

    @abstractmethod
    def is_positive_definite(self) -> Tensor:
        """Whether it is finite, symmetric and positive definite: bool, 0-d, or [B] per task."""

    @abstractmethod
    def gradient(self, x: Tensor, displacement: Tensor) -> Tensor:
        """`-Σ_i x_i (phi_i - theta)'` in the form of `values`; x and displacement are [B, D].

        Without the sum over the tasks if Λ is per task.
        """

    def of_task(self, task: int) -> Tensor:
        """The `values` of the operator of one task."""
        return self.values


class SharedLam(LamOperator):
    """One scalar [1], or one diagonal [D]."""

    is_fused = True

    def mv(self, rows: Tensor) -> Tensor:
        return rows * self.values

    def solve(self, rows: Tensor) -> Tensor:
        return torch.where(self.values > 0, rows / self.values, 0.0)

    def diagonal(self) -> Tensor:
        return self.values

    def norm(self) -> Tensor:
        if self.values.numel() == 1:
            return self.values.reshape(()).abs().double()
        norm: Tensor = torch.linalg.vector_norm(self.values, dtype=torch.float64)
        return norm

    def is_valid(self) -> Tensor:
        if self.values.numel() == 1:
            return ((self.values >= 0) & (self.values < torch.inf)).all()
        return self.is_positive_definite()

    def is_positive_definite(self) -> Tensor:
        return ((self.values > 0) & (self.values < torch.inf)).all()

    def gradient(self, x: Tensor, displacement: Tensor) -> Tensor:
        return self.gradient_of_products((x * displacement).sum(0))

    def gradient_of_products(self, products: Tensor) -> Tensor:
        """The gradient from `Σ_i x_i * (phi_i - theta)`, [D]."""
        return -(products.sum().reshape(1) if self.values.numel() == 1 else products)


class _Dense(LamOperator):
    """One symmetric matrix [D, D]."""

    def mv(self, rows: Tensor) -> Tensor:
        return matmul(rows, self.values)

    def solve(self, rows: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(self.values)
        return torch.where(info == 0, torch.cholesky_solve(rows.T, factor).T, 0.0)

    def diagonal(self) -> Tensor:
        return self.values.diagonal()

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.values, dtype=torch.float64)
        return norm

    def is_positive_definite(self) -> Tensor:
        matrix = self.values.detach()
        finite = matrix.isfinite().all()
        slack = 16 * torch.finfo(matrix.dtype).eps * matrix.abs().amax()
        symmetric = ((matrix - matrix.T).abs() <= slack).all()
        _, info = torch.linalg.cholesky_ex(torch.where(finite, matrix, 0.0))
        definite: Tensor = info == 0
        return finite & symmetric & definite

    def gradient(self, x: Tensor, displacement: Tensor) -> Tensor:
        product = matmul(x.T, displacement)
        return -0.5 * (product + product.T)


class _PerTask(LamOperator):
    """For each task a scalar, [B, 1, 1], or a diagonal, [B, 1, D]."""

    def mv(self, rows: Tensor) -> Tensor:
        return rows * self.diagonal()

    def solve(self, rows: Tensor) -> Tensor:
        return torch.where(self.diagonal() > 0, rows / self.diagonal(), 0.0)

    def diagonal(self) -> Tensor:
        return self.values[:, 0]

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.diagonal(), dim=1, dtype=torch.float64)
        return norm

    def is_positive_definite(self) -> Tensor:
        return ((self.diagonal() > 0) & (self.diagonal() < torch.inf)).all(1)

    def gradient(self, x: Tensor, displacement: Tensor) -> Tensor:
        products = x * displacement
        if self.values.shape[2] == 1:
            products = products.sum(1, keepdim=True)
        return -products[:, None]

    def of_task(self, task: int) -> Tensor:
        return self.values[task, 0]


def matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix` in the dtype of the rows, even under autocast."""
    device = rows.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return rows @ matrix
    with torch.autocast(device, enabled=False):
        return rows @ matrix


def product(lam: Tensor) -> Callable[[Tensor], Tensor]:
    """Row i times the matrix of task i, from [B, 1], diagonals [B, D] or matrices [B, D, D]."""
    if lam.dim() == 2:
        return lambda rows: lam * rows
    # A sum of products, since autocast would round a matrix product.
    return lambda rows: (lam * rows[:, None]).sum(2)
