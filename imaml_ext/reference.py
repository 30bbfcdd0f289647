"""The paper's algorithms for one task at a time, in plain PyTorch: the reference of the tests.

Slow, and shares no code with the library. For tests and benchmarks only.

Source: Rajeswaran, Finn, Kakade, Levine 2019, Algorithm 2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor, Any], Tensor]  # (phi, data) -> scalar, phi a flat vector


def inner_gradient_descent(
    loss: Loss, theta: Tensor, support: Any, lam: Tensor, lr: float, steps: int
) -> Tensor:
    """phi after `steps` steps on `loss(phi) + 1/2 (phi - theta)' Λ (phi - theta)`, [D]."""
    phi = theta.clone()
    for _ in range(steps):
        phi = phi.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(phi, support), phi)
        phi = phi.detach() - lr * (grad + lam * (phi.detach() - theta))
    return phi


def hessian_vector_product(loss: Loss, phi: Tensor, support: Any, vector: Tensor) -> Tensor:
    """`∇²loss(phi) vector`; every product builds the graph of the gradient again."""
    phi = phi.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(phi, support), phi, create_graph=True)
    (product,) = torch.autograd.grad(grad, phi, vector)
    return product


def conjugate_gradient(matvec: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x after `steps` steps on `A x = b`, A positive definite."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    for _ in range(steps):
        if rr == 0:
            break
        ap = matvec(p)
        alpha = rr / (p @ ap)
        x = x + alpha * p
        r = r - alpha * ap
        rr_new = r @ r
        p = r + (rr_new / rr) * p
        rr = rr_new
    return x


def implicit_meta_gradient(
    loss: Loss,
    theta: Tensor,
    support: Any,
    query: Any,
    lam: Tensor,
    *,
    lr: float,
    inner_steps: int,
    cg_steps: int,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 for one task: dL/dtheta [D], and dL/dΛ for a diagonal Λ, `-x (phi - theta)`."""
    phi = inner_gradient_descent(loss, theta, support, lam, lr, inner_steps)
    at_phi = phi.detach().requires_grad_()
    (v,) = torch.autograd.grad(loss(at_phi, query), at_phi)
    x = conjugate_gradient(
        lambda p: hessian_vector_product(loss, phi, support, p) + lam * p, v, cg_steps
    )
    return lam * x, -x * (phi - theta)
