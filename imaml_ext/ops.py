"""The operators of the C++/CUDA extension, `torch.ops.imaml`, as Python functions.

Importing this module loads the extension. Operators whose name ends in `_` write their arguments;
none is differentiable. All take float32 or float64 tensors, contiguous unless it is said, never
synchronise, and give the same bits for the same input on the same device. They run on the CPU and
on CUDA, but for the direct convolutions.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imaml_ext._version import __version__


def _load() -> ModuleType:
    if hasattr(torch.ops.imaml, "row_dot"):
        raise ImportError(
            "imaml_ext: another copy of the extension is loaded in this process; import one only"
        )
    try:
        from imaml_ext import _C
    except ImportError as error:
        raise ImportError(
            f"imaml_ext: its C++ extension cannot be loaded ({error}). Build it against the torch "
            f"of this environment ({torch.__version__}; 2.10 or newer is needed) by running "
            "`pip install .` in the source folder, or `pip install -e .` to import the package "
            "from the source folder itself."
        ) from error
    built = _C.build_info()["version"]
    if built != __version__:
        raise ImportError(
            f"imaml_ext: the C++ extension is of version {built}, the Python files of "
            f"{__version__}. Reinstall: `pip install --force-reinstall --no-deps .`"
        )
    return _C


_extension = _load()

Pair = tuple[int, int]
Window = tuple[int, int, int, int]


def build_info() -> dict[str, str]:
    """How the extension was built.

    Returns:
        "version", "torch_headers", "torch_minimum", "compiler", "instruction_set", and "cuda" and
        "cuda_architectures", which are "" without CUDA.
    """
    return dict(_extension.build_info())


WITHOUT_CUDA = (
    "imaml_ext was built without CUDA kernels: reinstall it with "
    "`pip install --force-reinstall --no-deps .` in its source folder, where torch has CUDA "
    "(IMAML_CUDA=on to insist)"
)


def _refuse_cuda() -> torch.library.Library:
    """Names the remedy wherever an operator without a CUDA kernel meets a CUDA tensor.

    The dispatcher's own message lists every backend that there is. The operators are those that
    are registered, so none can be forgotten. The result has to be kept: its end undoes this.
    """

    def refusal(operator: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> None:
            raise RuntimeError(f"{operator}: {WITHOUT_CUDA}")

        return refuse

    library = torch.library.Library("imaml", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        namespace, _, operator = name.partition("::")
        if namespace == "imaml":
            library.impl(operator, refusal(operator))
    return library


_refusing = None if build_info()["cuda"] else _refuse_cuda()


def cluster_occupancy(dim: int, dtype: torch.dtype, rows: int) -> tuple[int, dict[int, int]]:
    """How `cg_step_` works on [rows, dim] on the current CUDA device, without a preconditioner.

    Args:
        dim, dtype, rows: of its operands.

    Returns:
        The blocks of the cluster that works on a row, 0 where it takes three launches; and by the
        number of blocks how many rows the device works on at a time, 0 where that many blocks are
        no choice.

    Raises:
        RuntimeError: built without CUDA.
    """
    if not hasattr(_extension, "cg_occupancy"):
        raise RuntimeError(f"cluster_occupancy: {WITHOUT_CUDA}")
    blocks, at_a_time = _extension.cg_occupancy(rows, dim, dtype == torch.float64)
    return blocks, at_a_time


def _fake(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what the operator gives without memory: in a compiled graph, and on "meta".

    One operand on "meta" is enough for the dispatcher to choose it, so the others are looked at.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            devices = {t.device for t in arguments if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(
                    f"{operator}: all tensors must be on one device, got "
                    f"{', '.join(sorted(map(str, devices)))}"
                )
            return function(*arguments)

        torch.library.register_fake(f"imaml::{operator}", checked)
        return function

    return register


@_fake("cg_step_")
def _(x, r, p, hp, lam, damping, inverse, rr, rz, tol2, status, steps, curvature, beta):  # type: ignore[no-untyped-def]
    return None


@_fake("prox_gd_")
def _(phi, velocity, grad, theta, lam, lr, momentum, nesterov, status):  # type: ignore[no-untyped-def]
    return None


@_fake("prox_adam_")
def _(phi, first_moment, second_moment, grad, theta, lam, lr, beta1, beta2, eps, step, status):  # type: ignore[no-untyped-def]
    return None


@_fake("prox_norms")
def _(phi, grad, theta, lam):  # type: ignore[no-untyped-def]
    return phi.new_empty((phi.shape[0], 2), dtype=torch.float64)


@_fake("row_dot")
def _(a, b):  # type: ignore[no-untyped-def]
    return a.new_empty((a.shape[0],), dtype=torch.float64)


@_fake("conv")
def _(x, w, bias, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    height = (x.shape[2] + 2 * pad_h - w.shape[3]) // stride_h + 1
    width = (x.shape[3] + 2 * pad_w - w.shape[4]) // stride_w + 1
    return x.new_empty((*x.shape[:2], height, width, w.shape[1]))


@_fake("conv_data_gradient")
def _(g, w, in_h, in_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    return g.new_empty((*g.shape[:2], in_h, in_w, w.shape[2]))


@_fake("conv_weight_gradient")
def _(x, g, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], g.shape[4], x.shape[4], kernel_h, kernel_w))


@_fake("patches")
def _(x, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    height = (x.shape[2] + 2 * pad_h - kernel_h) // stride_h + 1
    width = (x.shape[3] + 2 * pad_w - kernel_w) // stride_w + 1
    rows, columns = x.shape[1] * height * width, x.shape[4] * kernel_h * kernel_w
    return x.new_empty((x.shape[0], rows, columns))


@_fake("patches_transpose")
def _(g, in_h, in_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    height = (in_h + 2 * pad_h - kernel_h) // stride_h + 1
    width = (in_w + 2 * pad_w - kernel_w) // stride_w + 1
    images, channels = g.shape[1] // (height * width), g.shape[2] // (kernel_h * kernel_w)
    return g.new_empty((g.shape[0], images, in_h, in_w, channels))


@_fake("batch_norm")
def _(x, gamma, beta, eps, relu):  # type: ignore[no-untyped-def]
    positive = torch.empty_like(x) if relu else x.new_empty(0)
    channels = x.shape[0], x.shape[2]
    return torch.empty_like(x), positive, x.new_empty(channels), x.new_empty(channels)


@_fake("batch_norm_backward")
def _(g, x, gamma, beta, mean, scale, relu):  # type: ignore[no-untyped-def]
    channels = x.shape[0], x.shape[2]
    return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)


@_fake("batch_norm_double_backward")
def _(a, b, c, g, x, gamma, beta, mean, scale, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]))


def _refuse_gradients(operator: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{operator}: not differentiable; call it under torch.no_grad() or detach its arguments"
        )


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

    With `Ap = hp + Λp + damping p` and z = r, or z = M⁻¹r under a preconditioner M:
    `alpha = r·z / p·Ap`, `x += alpha p`, `r -= alpha Ap`, `beta = r·z / old r·z`, `p = z + beta p`.
    A row moves only while its status is RUNNING. It becomes CONVERGED when `r·r <= tol2`, with a
    preconditioner too; NEGATIVE_CURVATURE when `p·Ap <= eps |p| |Ap|`, keeping x, or in its first
    step `x += r / Λ` where Λ > 0; NONFINITE, with x = 0, when a sum is not finite or `r·z` is not
    positive.

    Args:
        x, r, p: iterate, residual and direction, [B, D]; written. p starts as z.
        hp: `H p`, [B, D].
        lam: Λ, [1] for a scalar or [D] for a diagonal.
        damping: added to the diagonal.
        rr: r·r, [B] float64; written.
        tol2: squared absolute tolerance, [B] float64.
        status, steps: [B] int32; written.
        curvature, beta: p·Ap / r·z and beta of this iteration, 0 for a frozen row, [B] float64;
            written.
        inverse: M⁻¹ of a positive diagonal M, [B, D]; with it goes `rz`.
        rz: r·z, [B] float64; written.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit.
    """
    _refuse_gradients("cg_step_", x, r, p, hp, lam, inverse)
    torch.ops.imaml.cg_step_(
        x, r, p, hp, lam, damping, inverse, rr, rz, tol2, status, steps, curvature, beta
    )
    # The dispatcher does not do this for an operator defined in C++, and without it autograd would
    # not notice that a tensor it saved has been overwritten.
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
    """`phi -= lr g`, `g = grad + Λ (phi - theta)`: a gradient step on the proximal objective.

    With a velocity buffer, momentum as in `torch.optim.SGD`: `velocity = momentum velocity + g`,
    and the step is along the velocity, or along `g + momentum velocity` with `nesterov`.

    Args:
        phi: [B, D]; written.
        grad: gradient of the loss alone, [B, D].
        theta: [D], shared by all rows.
        lam: Λ, [1] or [D].
        lr: step size.
        velocity: [B, D]; written.
        momentum, nesterov: as in `torch.optim.SGD`; they need a velocity.
        status: [B] int32; a row that is not RUNNING is left alone.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit.
    """
    _refuse_gradients("prox_gd_", phi, grad, theta, lam)
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
        beta1, beta2: of the running means, in [0, 1).
        eps: added to the root.
        step: the number of this step, from 1.
        status: [B] int32; a row that is not RUNNING is left alone, and so are its m and v.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit, or a number is out of range.
    """
    _refuse_gradients("prox_adam_", phi, grad, theta, lam)
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
        RuntimeError: a shape, dtype, device or layout does not fit.
    """
    _refuse_gradients("prox_norms", phi, grad, theta, lam)
    grad_norm2, penalty = torch.ops.imaml.prox_norms(phi, grad, theta, lam).unbind(1)
    return grad_norm2, penalty


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """`a_i · b_i` for every row, [B] float64.

    Args:
        a, b: [B, D].

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit.
    """
    _refuse_gradients("row_dot", a, b)
    product: Tensor = torch.ops.imaml.row_dot(a, b)
    return product


def conv(x: Tensor, w: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Convolutions of B tasks, each with its own weights, on the CPU.

    Args:
        x: images, [B, N, H, W, C].
        w: weights, [B, O, C, kH, kW]; contiguous within each task.
        bias: added to every pixel, [B, O].
        window: strides and paddings, (sH, sW, pH, pW).

    Returns:
        [B, N, H', W', O], `H' = (H + 2 pH - kH) // sH + 1`.

    Raises:
        RuntimeError: a shape, dtype or layout does not fit; an operand is empty.
    """
    y: Tensor = torch.ops.imaml.conv(x, w, bias, *window)
    return y


def conv_data_gradient(g: Tensor, w: Tensor, size: Pair, window: Window) -> Tensor:
    """The gradient of `<g, conv(x, w)>` by x, [B, N, H, W, C].

    Args:
        g: like what `conv` returns.
        w, window: as in `conv`.
        size: (H, W).

    Raises:
        RuntimeError: as `conv`.
    """
    x: Tensor = torch.ops.imaml.conv_data_gradient(g, w, *size, *window)
    return x


def conv_weight_gradient(x: Tensor, g: Tensor, kernel: Pair, window: Window) -> Tensor:
    """The gradient of `<g, conv(x, w)>` by w, [B, O, C, kH, kW].

    Args:
        x, window: as in `conv`.
        g: like what `conv` returns.
        kernel: (kH, kW).

    Raises:
        RuntimeError: as `conv`.
    """
    w: Tensor = torch.ops.imaml.conv_weight_gradient(x, g, *kernel, *window)
    return w


def patches(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """What a convolution's window sees of each image, as the rows of a matrix, one matrix a task.

    With `w` [B, O, C, kH, kW], `patches(x, ...) @ w.flatten(2).mT` is the convolution of x.

    Args:
        x: images, [B, N, H, W, C].
        kernel: (kH, kW).
        window: as in `conv`.

    Returns:
        [B, N H' W', C kH kW], 0 outside of an image; H', W' as in `conv`.

    Raises:
        RuntimeError: as `conv`.
    """
    rows: Tensor = torch.ops.imaml.patches(x, *kernel, *window)
    return rows


def patches_transpose(g: Tensor, size: Pair, kernel: Pair, window: Window) -> Tensor:
    """The gradient of `<g, patches(x)>` by x, [B, N, H, W, C].

    Args:
        g: like what `patches` returns.
        size: (H, W).
        kernel, window: as in `patches`.

    Raises:
        RuntimeError: as `conv`.
    """
    x: Tensor = torch.ops.imaml.patches_transpose(g, *size, *kernel, *window)
    return x


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gamma h + beta` with `h = (x - mean) scale` over the rows of each task.

    Args:
        x: [B, R, C].
        gamma, beta: [B, C]; contiguous within each task.
        eps: added to the variance, of which `scale` is the inverse root.
        relu: also give the positive part.

    Returns:
        The result, like x, its positive part, like x or empty, and mean and scale, [B, C].

    Raises:
        RuntimeError: a shape, dtype or layout does not fit; an operand is empty.
    """
    y, positive, mean, scale = torch.ops.imaml.batch_norm(x, gamma, beta, eps, relu)
    return y, positive, mean, scale


def batch_norm_backward(
    g: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, scale: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `<g, y>` by x, gamma and beta, y what `batch_norm` gives for them.

    Args:
        g: like y.
        x, gamma, beta, mean, scale: what `batch_norm` took and gave.
        relu: of `<g, max(y, 0)>` instead.

    Returns:
        [B, R, C], [B, C] and [B, C].

    Raises:
        RuntimeError: as `batch_norm`.
    """
    dx, dgamma, dbeta = torch.ops.imaml.batch_norm_backward(g, x, gamma, beta, mean, scale, relu)
    return dx, dgamma, dbeta


def batch_norm_double_backward(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    scale: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `<(a, b, c), batch_norm_backward(g, x, gamma)>` by g, x and gamma.

    Args:
        a, b, c: like the three that `batch_norm_backward` returns; b and c contiguous within each
            task.
        g, x, gamma, beta, mean, scale, relu: as in `batch_norm_backward`.

    Returns:
        [B, R, C], [B, R, C] and [B, C].

    Raises:
        RuntimeError: as `batch_norm`.
    """
    to_g, to_x, to_gamma = torch.ops.imaml.batch_norm_double_backward(
        a, b, c, g, x, gamma, beta, mean, scale, relu
    )
    return to_g, to_x, to_gamma
