"""The meta-gradient of a batch in JAX, in several formulations.

The whole meta-gradient is one jitted function; inner steps and CG iterations are loops inside it.
Parameters are a pytree in JAX's layouts; only the result is a flat vector.

- Convolutions: `lax.conv`, which becomes a grouped convolution under `vmap` over the tasks'
  weights; im2col, nine strided slices and a (batched) matrix product; or `lax.map` over the tasks,
  where no convolution is grouped.
- Hessian-vector products: forward over reverse in each CG iteration, or `linearize` of the gradient
  once, whose residuals are used by all iterations.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # XLA's threads on the CPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import Tensor, nn
from workload import Workload

jax.config.update("jax_enable_x64", True)  # allow float64; float32 stays float32

Tree = Any
Convolution = Callable[[Array, Array], Array]  # ([N, H, W, I], [3, 3, I, O]) -> [N, H', W', O]


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def lax_convolution(x: Array, weight: Array) -> Array:
    return lax.conv_general_dilated(
        x, weight, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def im2col_convolution(x: Array, weight: Array) -> Array:
    count, height, width, _ = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    patches = jnp.concatenate(shifted, -1).reshape(count * rows * columns, -1)
    return (patches @ weight.reshape(patches.shape[1], -1)).reshape(count, rows, columns, -1)


def to_jax(tensor: Tensor) -> Array:
    """A copy as a JAX array; kernels [O, I, 3, 3] become [3, 3, I, O]."""
    tensor = tensor.detach().permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor.detach()
    return jnp.from_dlpack(tensor.contiguous().clone())


def forward(model: nn.Sequential, convolution: Convolution) -> Callable[[Tree, Array], Array]:
    """A `conv4` or an `mlp` as a function of its parameters; images are [N, H, W, C]."""

    def outputs(params: Tree, x: Array) -> Array:
        for number, layer in enumerate(model):
            weight, bias = params.get(f"{number}.weight"), params.get(f"{number}.bias")
            if isinstance(layer, nn.Conv2d):
                x = convolution(x, weight) + bias
            elif isinstance(layer, nn.BatchNorm2d):
                mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
                x = (x - mean) * (lax.rsqrt(variance + layer.eps) * weight) + bias
            elif isinstance(layer, nn.ReLU):
                x = jax.nn.relu(x)
            elif isinstance(layer, nn.Flatten):
                x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
            elif isinstance(layer, nn.Linear):
                x = x @ weight.T + bias
            else:
                raise TypeError(f"no JAX formulation of {type(layer).__name__}")
        return x

    return outputs


def conjugate_gradient(matvec: Callable[[Tree], Tree], b: Tree, steps: int) -> Tree:
    def dot(u: Tree, v: Tree) -> Array:
        return sum(jax.tree.leaves(jax.tree.map(lambda a, c: (a * c).sum(), u, v)))

    def iterate(_: int, state: tuple[Tree, Tree, Tree, Array]) -> tuple[Tree, Tree, Tree, Array]:
        x, r, p, rr = state
        ap = matvec(p)
        alpha = rr / dot(p, ap)
        x = jax.tree.map(lambda x, p: x + alpha * p, x, p)
        r = jax.tree.map(lambda r, ap: r - alpha * ap, r, ap)
        rr_new = dot(r, r)
        p = jax.tree.map(lambda r, p: r + (rr_new / rr) * p, r, p)
        return x, r, p, rr_new

    start = (jax.tree.map(jnp.zeros_like, b), b, b, dot(b, b))
    return lax.fori_loop(0, steps, iterate, start)[0]


class MetaGradient:
    """A formulation: a call returns the mean meta-gradient, [D]; the first call compiles."""

    def __init__(self, batch: Callable[..., Array], operands: tuple[Tree, Tree, Tree]) -> None:
        self.compiled = jax.jit(batch)
        self.operands = operands

    def submit(self) -> Array:
        return self.compiled(*self.operands)

    def __call__(self) -> Tensor:
        return torch.from_dlpack(self.submit().block_until_ready())

    def temporary_bytes(self) -> int:
        """Memory that the compiled function reserves, without operands and result."""
        analysis = self.compiled.lower(*self.operands).compile().memory_analysis()
        reserved: int = analysis.temp_size_in_bytes
        return reserved


def formulations(workload: Workload) -> dict[str, MetaGradient]:
    """{name: meta-gradient} of all formulations."""
    convolutions = [("vmap", lax_convolution)]
    if workload.name != "sinusoid":
        convolutions = [
            ("vmap of lax.conv", lax_convolution),
            ("vmap of im2col", im2col_convolution),
            ("map of lax.conv", lax_convolution),
        ]
    return {
        f"JAX, {name}, {product}": _meta_gradient(workload, name, convolution, product)
        for name, convolution in convolutions
        for product in ("forward over reverse", "linearize")
    }


def _meta_gradient(
    workload: Workload, name: str, convolution: Convolution, product: str
) -> MetaGradient:
    outputs = forward(workload.model, convolution)
    lr, lam = workload.lr, workload.lam

    def loss(params: Tree, data: tuple[Array, Array]) -> Array:
        x, y = data
        z = outputs(params, x)
        if workload.name == "sinusoid":
            return ((z - y) ** 2).mean()
        return (
            -(jax.nn.log_softmax(z) * jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)).sum(-1).mean()
        )

    gradient = jax.grad(loss)

    def one_task(theta: Tree, support: Any, query: Any) -> Tree:
        def descend(_: int, phi: Tree) -> Tree:
            return jax.tree.map(
                lambda p, g, t: p - lr * (g + lam * (p - t)), phi, gradient(phi, support), theta
            )

        def support_gradient(phi: Tree) -> Tree:
            return gradient(phi, support)

        phi = lax.fori_loop(0, workload.inner_steps, descend, theta)
        if product == "linearize":
            hessian = jax.linearize(support_gradient, phi)[1]
        else:

            def hessian(p: Tree) -> Tree:
                return jax.jvp(support_gradient, (phi,), (p,))[1]

        def matvec(p: Tree) -> Tree:
            return jax.tree.map(lambda hp, p: hp + lam * p, hessian(p), p)

        x = conjugate_gradient(matvec, gradient(phi, query), workload.cg_steps)
        return jax.tree.map(lambda x: lam * x, x)

    def batch(theta: Tree, support: Any, query: Any) -> Array:
        if name.startswith("map"):
            each = lax.map(lambda data: one_task(theta, *data), (support, query))
        else:
            each = jax.vmap(one_task, (None, 0, 0))(theta, support, query)
        rows = {key: value.mean(0) for key, value in each.items()}
        return jnp.concatenate(
            [
                (rows[key].transpose(3, 2, 0, 1) if rows[key].ndim == 4 else rows[key]).ravel()
                for key in workload.params
            ]
        )

    theta = {key: to_jax(tensor) for key, tensor in workload.params.items()}

    def data(pair: tuple[Tensor, Tensor]) -> tuple[Array, Array]:
        x, y = pair
        x = x.permute(0, 1, 3, 4, 2) if x.dim() == 5 else x
        return tuple(jnp.from_dlpack(tensor.contiguous().clone()) for tensor in (x, y))

    support, query = data(workload.support), data(workload.query)
    return MetaGradient(batch, (theta, support, query))
