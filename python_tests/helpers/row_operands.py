"""Operands of the operators on rows."""

import torch

# Around the boundaries of the kernels: warps, blocks, chunks, threads.


SHAPES = [(1, 1), (3, 17), (5, 4096), (2, 4097), (16, 1761), (70, 3), (0, 5)]


ADAM = {
    "first_moment": torch.zeros(3, 4),
    "second_moment": torch.zeros(3, 4),
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "step": 1,
}


def tolerance(dtype):
    return (
        {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    )


def cg_arguments(rows, dim, dtype, device, lam=None, preconditioned=False):
    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    x, r, p = normal(rows, dim), normal(rows, dim), normal(rows, dim)
    hp = 2 * p
    lam = torch.full((1,), 0.5, dtype=dtype, device=device) if lam is None else lam
    per_row = {"dtype": torch.float64, "device": device}
    integers = {"dtype": torch.int32, "device": device}
    state = {
        "rr": (r.double() ** 2).sum(1),
        "tol2": torch.zeros(rows, **per_row),
        "status": torch.zeros(rows, **integers),
        "steps": torch.zeros(rows, **integers),
        "curvature": torch.full((rows,), -7.0, **per_row),
        "beta": torch.full((rows,), -7.0, **per_row),
    }
    if preconditioned:
        state["inverse"] = torch.rand_like(r) + 0.5
        state["rz"] = (r.double() ** 2 * state["inverse"]).sum(1)
    return (x, r, p, hp, lam), state
