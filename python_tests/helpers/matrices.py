"""Symmetric matrices with a known spectrum, and their products, for the linear solvers."""

import torch


def symmetric(eigenvalues):
    """[B, D, D] with these eigenvalues [B, D] and random eigenvectors."""
    q, _ = torch.linalg.qr(torch.randn(*eigenvalues.shape, eigenvalues.shape[-1]).to(eigenvalues))
    return q @ torch.diag_embed(eigenvalues) @ q.mT


def product(matrix):
    return lambda p: (matrix @ p[..., None])[..., 0]
