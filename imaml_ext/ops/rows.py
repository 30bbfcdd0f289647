"""The operators on rows, one row per task, as Python functions.

Operators whose name ends in `_` modify arguments in place; none is differentiable. All take
contiguous float32 or float64 tensors, run on the CPU and on CUDA, never synchronise, and give the
same bits for the same input on the same device.
"""

import torch
from torch import Tensor

from imaml_ext.ops.extension import WITHOUT_CUDA, extension, fake, refuse_gradients


def cluster_occupancy(dim: int, dtype: torch.dtype, rows: int) -> tuple[int, dict[int, int]]:
    """How `cg_step_` runs on the current CUDA device, without a preconditioner.

    Args:
        dim, dtype, rows: D, dtype and B of its operands [B, D].

    Returns:
        The number of blocks per row, 0 if it takes three launches; and for every number of blocks
        the number of rows in flight at the same time, 0 if that number of blocks is not available.

    Raises:
        RuntimeError: the extension was built without CUDA.
    """
    if not hasattr(extension, "cg_occupancy"):
        raise RuntimeError(f"cluster_occupancy: {WITHOUT_CUDA}")
    blocks, concurrent_rows = extension.cg_occupancy(rows, dim, dtype == torch.float64)
    return blocks, concurrent_rows


def is_finite(values: Tensor) -> Tensor:
    """`values.isfinite()` of floating-point values, in two operators instead of five."""
    return values.abs() < torch.inf


def is_not_finite(values: Tensor) -> Tensor:
    """`~is_finite(values)`, in two operators."""
    return values - values != 0


@fake("cg_step_")
def _(x, r, p, hp, lam, damping, inverse, rr, rz, tol2, status, steps, curvature, beta):  # type: ignore[no-untyped-def]
    return None


@fake("prox_gd_")
def _(phi, velocity, grad, theta, lam, lr, momentum, nesterov, status):  # type: ignore[no-untyped-def]
    return None


@fake("prox_adam_")
def _(phi, first_moment, second_moment, grad, theta, lam, lr, beta1, beta2, eps, step, status):  # type: ignore[no-untyped-def]
    return None


@fake("prox_norms")
def _(phi, grad, theta, lam):  # type: ignore[no-untyped-def]
    return phi.new_empty((phi.shape[0], 2), dtype=torch.float64)


@fake("row_dot")
def _(a, b):  # type: ignore[no-untyped-def]
    return a.new_empty((a.shape[0],), dtype=torch.float64)


@fake("pull_back")
def _(x, phi, theta, weight, use):  # type: ignore[no-untyped-def]
    return x.new_empty((2, x.shape[1]))


def cg_step_(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    hp: Tensor,
    lam: Tensor,
    *,
    damping: float,
    rr: Tensor,
    tol2: Tensor,
    status: Tensor,
    steps: Tensor,
    curvature: Tensor,
    beta: Tensor,
    inverse: Tensor | None = None,
    rz: Tensor | None = None,
) -> None:
    """One conjugate-gradient iteration on `(H_i + Λ + damping I) x_i = b_i`, for every row i.

    With `Ap = hp + Λp + damping p` and z = r, or z = M⁻¹r with a preconditioner M:
    `alpha = r·z / p·Ap`, `x += alpha p`, `r -= alpha Ap`, `beta = r·z / old r·z`, `p = z + beta p`.
    Only rows with status RUNNING are updated. A row becomes CONVERGED when `r·r <= tol2`, also with
    a preconditioner; NEGATIVE_CURVATURE when `p·Ap <= eps |p| |Ap|`, where x does not change,
    except in the first step: `x += r / Λ` where Λ > 0; NONFINITE, with x = 0, when a sum is not
    finite or `r·z` is not positive.

    Args:
        x, r, p: iterate, residual and direction, [B, D]; written. Before the first step p = z.
        hp: `H p`, [B, D].
        lam: Λ, [1] for a scalar or [D] for a diagonal.
        damping: added to the diagonal.
        rr: r·r, [B] float64; written.
        tol2: squared absolute tolerance, [B] float64.
        status, steps: [B] int32; written.
        curvature, beta: p·Ap / r·z and beta of this iteration, 0 for a frozen row, [B] float64;
            written.
        inverse: M⁻¹ of a positive diagonal M, [B, D]; needs `rz`.
        rz: r·z, [B] float64; written.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout.
    """
    refuse_gradients("cg_step_", x, r, p, hp, lam, inverse)
    torch.ops.imaml.cg_step_(
        x, r, p, hp, lam, damping, inverse, rr, rz, tol2, status, steps, curvature, beta
    )
    # The dispatcher does not do this for stable-ABI operators. Without it autograd would not detect
    # that a saved tensor was overwritten.
    written = (x, r, p, rr, status, steps, curvature, beta)
    torch.autograd.graph.increment_version(written if rz is None else (*written, rz))


def prox_gd_(
    phi: Tensor,
    grad: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    lr: float,
    velocity: Tensor | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    status: Tensor | None = None,
) -> None:
    """`phi -= lr g` with `g = grad + Λ (phi - theta)`: a gradient step on the proximal objective.

    With a velocity buffer, momentum as in `torch.optim.SGD`: `velocity = momentum velocity + g`,
    and the velocity, or with `nesterov` `g + momentum velocity`, replaces g in the step.

    Args:
        phi: [B, D]; written.
        grad: gradient of the loss without the proximal term, [B, D].
        theta: [D], the same for all rows.
        lam: Λ, [1] or [D].
        lr: step size.
        velocity: [B, D]; written.
        momentum, nesterov: as in `torch.optim.SGD`; need a velocity.
        status: [B] int32; rows that are not RUNNING are not updated.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout.
    """
    refuse_gradients("prox_gd_", phi, grad, theta, lam)
    torch.ops.imaml.prox_gd_(phi, velocity, grad, theta, lam, lr, momentum, nesterov, status)
    torch.autograd.graph.increment_version(phi if velocity is None else (phi, velocity))


def prox_adam_(
    phi: Tensor,
    grad: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    lr: float,
    first_moment: Tensor,
    second_moment: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    status: Tensor | None = None,
) -> None:
    """A step of `torch.optim.Adam` on the proximal objective, with `g = grad + Λ (phi - theta)`.

    `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g²`, and
    `phi -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)`.

    Args:
        phi, grad, theta, lam, lr: as in `prox_gd_`.
        first_moment, second_moment: m and v, [B, D], 0 before the first step; written.
        beta1, beta2: decay rates of m and v, in [0, 1).
        eps: added to the square root.
        step: the number of this step, starting at 1.
        status: [B] int32; rows that are not RUNNING are not updated, nor are their m and v.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout, or a number is out of
            range.
    """
    refuse_gradients("prox_adam_", phi, grad, theta, lam)
    torch.ops.imaml.prox_adam_(
        phi, first_moment, second_moment, grad, theta, lam, lr, beta1, beta2, eps, step, status
    )
    torch.autograd.graph.increment_version((phi, first_moment, second_moment))


def prox_norms(phi: Tensor, grad: Tensor, theta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """`|grad + Λ (phi - theta)|²` and `(phi - theta)' Λ (phi - theta)` per row, [B] float64 each.

    Reads each operand once.

    Args:
        phi, grad, theta, lam: as in `prox_gd_`.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout.
    """
    refuse_gradients("prox_norms", phi, grad, theta, lam)
    grad_norm2, penalty = torch.ops.imaml.prox_norms(phi, grad, theta, lam).unbind(1)
    return grad_norm2, penalty


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """`a_i · b_i` for every row, [B] float64.

    Args:
        a, b: [B, D].

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout.
    """
    refuse_gradients("row_dot", a, b)
    product: Tensor = torch.ops.imaml.row_dot(a, b)
    return product


def pull_back(
    x: Tensor, phi: Tensor, theta: Tensor, weight: Tensor, use: Tensor
) -> tuple[Tensor, Tensor]:
    """`Σ_i w x_i` and `Σ_i w x_i * (phi_i - theta)`, [D] each, where a row's terms may count as 0.

    Reads x and phi once. The weight is applied before the sums; one that is NaN makes them NaN.

    Args:
        x, phi: [B, D].
        theta: [D].
        weight: w, [1].
        use: [B] int32: 2 for a row that counts; 1 where `phi_i - theta` counts as 0; 0 where x_i
            does too.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout.
    """
    refuse_gradients("pull_back", x, phi, theta, weight)
    x_sum, product_sum = torch.ops.imaml.pull_back(x, phi, theta, weight, use).unbind(0)
    return x_sum, product_sum
