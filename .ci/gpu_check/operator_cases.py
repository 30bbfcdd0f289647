"""Operands for each operator of the extension, by the operator's name.

A case is a label and operands by the names in the operator's schema (others are not passed);
tensors are float64 on the CPU. A new operator needs an entry in CASES.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from imaml_ext.solvers.solution import Status

Case = tuple[str, dict[str, Any]]
Cases = Callable[[list[int]], Iterator[Case]]  # argument: numbers of parameters D

SHARED = {"lam", "theta", "weight"}  # the same for all rows
SUMS = {"pull_back"}  # operators whose result is a sum over the rows
ALWAYS_DOUBLE = {"rr", "rz", "tol2", "curvature", "beta"}  # in row operators
ROWS = 5
LONG = 10_000  # for longer rows only some combinations: the host would take too long


class Draw:
    """Random numbers from a fixed seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, dtype=torch.float64, generator=self._generator)


def lams(draw: Draw, dim: int) -> dict[str, Tensor]:
    return {"scalar lam": draw.positive(1), "diagonal lam": draw.positive(dim)}


def cg_step(dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        draw = Draw(dim)
        for number, (name, lam) in enumerate(lams(draw, dim).items()):
            for preconditioned in (False, True) if dim < LONG else (number == 1,):
                label = f"D={dim}, {name}" + (", preconditioned" if preconditioned else "")
                yield label, cg_step_operands(draw, dim, lam, preconditioned)


def cg_step_operands(draw: Draw, dim: int, lam: Tensor, preconditioned: bool) -> dict[str, Any]:
    """One row each that runs, converges, has negative curvature, is frozen, or is non-finite."""
    x, r = draw.normal(ROWS, dim), draw.normal(ROWS, dim)
    inverse = draw.positive(ROWS, dim) if preconditioned else None
    p = r.clone() if inverse is None else inverse * r
    hp = draw.positive(ROWS, dim) * p
    hp[2] = -5 * p[2]
    hp[4, dim // 2] = torch.nan
    status = torch.zeros(ROWS, dtype=torch.int32)
    status[3] = Status.CONVERGED
    tol2 = torch.zeros(ROWS, dtype=torch.float64)
    tol2[1] = 1e9 * dim
    return {
        "x": x, "r": r, "p": p, "hp": hp, "lam": lam, "damping": 0.25, "inverse": inverse,
        "rr": (r * r).sum(1), "rz": (r * p).sum(1) if preconditioned else None, "tol2": tol2,
        "status": status, "steps": torch.ones(ROWS, dtype=torch.int32),
        "curvature": torch.zeros(ROWS, dtype=torch.float64),
        "beta": torch.zeros(ROWS, dtype=torch.float64),
    }  # fmt: skip


def proximal(draw: Draw, dim: int, lam: Tensor) -> dict[str, Any]:
    theta = draw.normal(dim)
    return {
        "phi": theta + draw.normal(ROWS, dim), "grad": draw.normal(ROWS, dim), "theta": theta,
        "lam": lam,
    }  # fmt: skip


def with_status(operands: dict[str, Any]) -> dict[str, Any]:
    status = torch.zeros(ROWS, dtype=torch.int32)
    status[2] = Status.CONVERGED
    return operands | {"status": status}


def prox_gd(dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        draw = Draw(dim)
        for name, lam in lams(draw, dim).items():
            plain = {"velocity": None, "lr": 0.1, "momentum": 0.0, "nesterov": False}
            momentum = plain | {
                "velocity": draw.normal(ROWS, dim), "momentum": 0.9, "nesterov": True,
            }  # fmt: skip
            both = [("plain", plain), ("momentum", momentum)]
            for way, numbers in both if dim < LONG else both[name == "diagonal lam" :][:1]:
                yield f"D={dim}, {name}, {way}", with_status(proximal(draw, dim, lam) | numbers)


def prox_adam(dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        draw = Draw(dim)
        for name, lam in lams(draw, dim).items():
            moments = {
                "first_moment": draw.normal(ROWS, dim), "second_moment": draw.positive(ROWS, dim),
                "lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3,
            }  # fmt: skip
            yield f"D={dim}, {name}", with_status(proximal(draw, dim, lam) | moments)


def prox_norms(dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        draw = Draw(dim)
        for name, lam in lams(draw, dim).items():
            yield f"D={dim}, {name}", proximal(draw, dim, lam)


def row_dot(dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        draw = Draw(dim)
        a = draw.normal(ROWS, dim)
        yield f"D={dim}", {"a": a, "b": a + 0.5 * draw.normal(ROWS, dim)}


def pull_back(dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        draw = Draw(dim)
        use = torch.tensor([2, 1, 0, 2, 2], dtype=torch.int32)
        operands = {"x": draw.normal(ROWS, dim), "phi": draw.normal(ROWS, dim)}
        operands["x"][2] = torch.nan
        shared = {"theta": draw.normal(dim), "weight": draw.positive(1)}
        yield f"D={dim}", operands | shared | {"use": use}


# Shapes of images [B, N, H, W, C] and of a kernel, strides and padding: conv4's, and unusual ones.
WINDOWS = (
    ((3, 5, 28, 28, 1), (64, 3, 3), (2, 2, 1, 1)),
    ((3, 5, 14, 14, 64), (64, 3, 3), (2, 2, 1, 1)),
    ((3, 2, 7, 5, 3), (5, 3, 2), (1, 3, 0, 2)),
    ((2, 1, 4, 4, 2), (3, 1, 1), (1, 1, 0, 0)),
)
Window = tuple[tuple[int, ...], tuple[int, int, int], tuple[int, int, int, int]]


def windows() -> Iterator[tuple[str, Draw, Window, tuple[int, int], dict[str, int]]]:
    """Label, random numbers, window, output size, and the window's arguments in the schema."""
    for window in WINDOWS:
        (_, _, height, width, _), (_, kernel_h, kernel_w), numbers = window
        stride_h, stride_w, pad_h, pad_w = numbers
        size = (
            (height + 2 * pad_h - kernel_h) // stride_h + 1,
            (width + 2 * pad_w - kernel_w) // stride_w + 1,
        )
        names = ("stride_h", "stride_w", "pad_h", "pad_w")
        label = f"{list(window[0])} by {list(window[1])}"
        yield label, Draw(sum(window[0])), window, size, dict(zip(names, numbers, strict=True))


def conv(dims: list[int]) -> Iterator[Case]:
    for label, draw, (images, kernel, _), _, numbers in windows():
        b, channels, out = images[0], images[4], kernel[0]
        x, w = draw.normal(*images), draw.normal(b, out, channels, *kernel[1:])
        yield label, {"x": x, "w": w, "bias": draw.normal(b, out), **numbers}


def conv_data_gradient(dims: list[int]) -> Iterator[Case]:
    for label, draw, (images, kernel, _), size, numbers in windows():
        (b, n, height, width, channels), out = images, kernel[0]
        g, w = draw.normal(b, n, *size, out), draw.normal(b, out, channels, *kernel[1:])
        yield label, {"g": g, "w": w, "in_h": height, "in_w": width, **numbers}


def conv_weight_gradient(dims: list[int]) -> Iterator[Case]:
    for label, draw, (images, kernel, _), size, numbers in windows():
        x, g = draw.normal(*images), draw.normal(*images[:2], *size, kernel[0])
        yield label, {"x": x, "g": g, "kernel_h": kernel[1], "kernel_w": kernel[2], **numbers}


def conv_weight_gradient_(dims: list[int]) -> Iterator[Case]:
    for label, operands in conv_weight_gradient(dims):
        kernel = operands.pop("kernel_h"), operands.pop("kernel_w")
        x, g = operands["x"], operands["g"]
        dw = torch.zeros(len(x), g.shape[4], x.shape[4], *kernel, dtype=torch.float64)
        yield label, operands | {"dw": dw}


def patches(dims: list[int]) -> Iterator[Case]:
    for label, draw, (images, kernel, _), _, numbers in windows():
        sides = {"kernel_h": kernel[1], "kernel_w": kernel[2]}
        yield label, {"x": draw.normal(*images), **sides, **numbers}


def patches_transpose(dims: list[int]) -> Iterator[Case]:
    """Patches are [B, N H' W', kH kW C]."""
    for label, draw, (images, kernel, _), size, numbers in windows():
        (b, n, height, width, channels), sides = images, kernel[1:]
        g = draw.normal(b, n * size[0] * size[1], sides[0] * sides[1] * channels)
        given = {"kernel_h": sides[0], "kernel_w": sides[1], "in_h": height, "in_w": width}
        yield label, {"g": g, **given, **numbers}


def channel_sums(dims: list[int]) -> Iterator[Case]:
    for shape in (*NORMS, (2, 19600, 64), (3, 20, 6)):
        yield f"{list(shape)}", {"g": Draw(sum(shape)).normal(*shape)}


# Rows, columns and terms of conv4's products, for 5, 20 and 100 images, and of others.
PRODUCTS = (
    (20, 64, 576, False, True), (245, 64, 576, False, True), (980, 64, 9, False, True),
    (980, 64, 576, False, True), (4900, 64, 576, False, True), (20, 576, 64, False, False),
    (245, 576, 64, False, False), (64, 9, 980, True, False), (64, 9, 4900, True, False),
    (64, 576, 245, True, False), (64, 576, 4900, True, False), (33, 17, 259, True, True),
)  # fmt: skip


def batched_product(dims: list[int]) -> Iterator[Case]:
    for rows, columns, terms, transpose_a, transpose_b in PRODUCTS:
        draw = Draw(rows + columns + terms)
        a = draw.normal(3, terms, rows) if transpose_a else draw.normal(3, rows, terms)
        parameters = draw.normal(3, columns * terms + 3)[:, 1:-2]  # as slices of rows of them
        b = parameters.unflatten(1, (columns, terms) if transpose_b else (terms, columns))
        label = f"{rows} x {columns}, {terms} terms, {'NT'[transpose_a]}{'NT'[transpose_b]}"
        yield label, {"a": a, "b": b, "transpose_a": transpose_a, "transpose_b": transpose_b}


NORMS = ((3, 2, 1), (3, 130, 33), (2, 980, 64))  # [B, R, C]


def norms(seed: int) -> Iterator[tuple[str, Draw, dict[str, Tensor]]]:
    """Outputs are at least 1e-4 from 0, where rounding would decide the result of a ReLU."""
    for shape in NORMS:
        draw = Draw(seed)
        gamma, beta = draw.positive(shape[0], shape[2]), draw.normal(shape[0], shape[2])
        x = draw.normal(*shape)
        for _ in range(20):
            mean, variance = x.mean(1), x.var(1, correction=0)
            scale = (variance + 1e-5).rsqrt()
            y = gamma[:, None] * (x - mean[:, None]) * scale[:, None] + beta[:, None]
            x = torch.where(y.abs() < 1e-4, x + 1e-2, x)
        given = {"x": x, "gamma": gamma, "beta": beta, "mean": mean, "scale": scale}
        yield f"{list(shape)}", draw, given


def batch_norm(dims: list[int]) -> Iterator[Case]:
    for label, _, given in norms(0):
        for relu in (False, True):
            yield f"{label}, relu {relu}", given | {"eps": 1e-5, "relu": relu}


def batch_norm_backward(dims: list[int]) -> Iterator[Case]:
    for label, draw, given in norms(1):
        for relu in (False, True):
            g = draw.normal(*given["x"].shape)
            yield f"{label}, relu {relu}", {"g": g, **given, "relu": relu}


def batch_norm_double_backward(dims: list[int]) -> Iterator[Case]:
    for label, draw, given in norms(2):
        for relu in (False, True):
            a, g = draw.normal(*given["x"].shape), draw.normal(*given["x"].shape)
            b, c = draw.normal(*given["gamma"].shape), draw.normal(*given["gamma"].shape)
            yield f"{label}, relu {relu}", {"a": a, "b": b, "c": c, "g": g, **given, "relu": relu}


ON_ROWS: dict[str, Cases] = {
    "cg_step_": cg_step,
    "prox_gd_": prox_gd,
    "prox_adam_": prox_adam,
    "prox_norms": prox_norms,
    "row_dot": row_dot,
    "pull_back": pull_back,
}
CASES: dict[str, Cases] = ON_ROWS | {
    "conv": conv,
    "conv_data_gradient": conv_data_gradient,
    "conv_weight_gradient": conv_weight_gradient,
    "conv_weight_gradient_": conv_weight_gradient_,
    "patches": patches,
    "patches_transpose": patches_transpose,
    "channel_sums": channel_sums,
    "batched_product": batched_product,
    "batch_norm": batch_norm,
    "batch_norm_backward": batch_norm_backward,
    "batch_norm_double_backward": batch_norm_double_backward,
}
