"""How fast is the fused vector work of conjugate gradient, compared with other implementations?

Times a fixed number of iterations on [B, D] systems `(H + lam I) x = b`. The products with H are
computed beforehand and are the same for all, so that only the work between them is timed. The
fraction of copy bandwidth assumes 7 passes over memory per iteration, the minimum, and a copy of
the same footprint. TorchOpt and linear_operator also request the product with the initial guess
0, and receive zeros. On CUDA, several copies of the operands are used in turn, so that they are not
in the cache; imaml_ext and plain PyTorch are also timed as CUDA graphs, because launches may
dominate.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from cuda_timing import Rotated, captured, copies
from harness import (
    Implementation,
    Implementations,
    add_without,
    check_agreement,
    copy_bandwidth,
    has_peer,
    jax_peer,
    leave_out,
    parser,
    provenance,
    report,
    seconds,
    time_in_turn,
)
from torch import Tensor

from imaml_ext.ops import cg_step_, row_dot

LAM = 2.0
GRAPHED = ("imaml_ext", "plain batched PyTorch")

State = tuple[Any, Any, Any, Any]  # x, r, p and r·r


def batched_step(x: Any, r: Any, p: Any, rr: Any, hp: Any) -> State:
    """One iteration for all rows, in plain PyTorch or JAX."""
    ap = hp + LAM * p
    alpha = rr / (p * ap).sum(1)[:, None]
    x = x + alpha * p
    r = r - alpha * ap
    rr_new = (r * r).sum(1)[:, None]
    p = r + (rr_new / rr) * p
    return x, r, p, rr_new


def one_task_step(x: Tensor, r: Tensor, p: Tensor, rr: Tensor, hp: Tensor) -> State:
    """One iteration for one task, as in the loop over tasks of the iMAML authors' code."""
    ap = hp + LAM * p
    alpha = rr / torch.dot(p, ap)
    x = x + alpha * p
    r = r - alpha * ap
    rr_new = torch.dot(r, r)
    p = r + (rr_new / rr) * p
    return x, r, p, rr_new


@dataclass(frozen=True)
class Systems:
    """Right-hand sides [B, D] of norm 1 and the products `H p` [B, D] of a real solve."""

    b: Tensor
    products: list[Tensor]

    @staticmethod
    def make(tasks: int, dim: int, iterations: int, like: Tensor) -> "Systems":
        # Sampled in float64, so that both precisions solve the same systems. linear_operator
        # divides by the norm of b: the recorded products match its iterates if the norm is 1.
        generator = torch.Generator().manual_seed(0)
        b = torch.randn(tasks, dim, dtype=torch.float64, generator=generator)
        b /= b.norm(dim=1, keepdim=True)
        h = 10 * torch.rand(tasks, dim, dtype=torch.float64, generator=generator)
        products = []
        state: State = torch.zeros_like(b), b, b, (b * b).sum(1)[:, None]
        for _ in range(iterations):
            products.append(h * state[2])
            state = batched_step(*state, products[-1])
        return Systems(b.to(like), [product.to(like) for product in products])

    def clone(self) -> "Systems":
        return Systems(self.b.clone(), [product.clone() for product in self.products])


class Fused:
    """`cg_step_`, in place; `prepare` resets its operands."""

    def __init__(self, systems: Systems) -> None:
        b = systems.b
        self.systems = systems
        self.lam = b.new_full((1,), LAM)
        self.x, self.r, self.p = torch.zeros_like(b), b.clone(), b.clone()
        self.rr = row_dot(b, b)
        self.first_rr, self.tol2 = self.rr.clone(), torch.zeros_like(self.rr)
        self.status = torch.zeros(len(b), dtype=torch.int32, device=b.device)
        self.steps = torch.zeros_like(self.status)
        self.curvature, self.beta = self.rr.new_empty(2, len(b))

    def prepare(self) -> None:
        self.x.zero_()
        self.r.copy_(self.systems.b)
        self.p.copy_(self.systems.b)
        self.rr.copy_(self.first_rr)
        self.status.zero_()
        self.steps.zero_()

    def __call__(self) -> Tensor:
        for hp in self.systems.products:
            cg_step_(
                self.x, self.r, self.p, hp, self.lam, damping=0.0, rr=self.rr, tol2=self.tol2,
                status=self.status, steps=self.steps, curvature=self.curvature, beta=self.beta,
            )  # fmt: skip
        return self.x


def batched(systems: Systems, step: Callable[..., State] = batched_step) -> Implementation:
    b = systems.b

    def call() -> Tensor:
        now: State = torch.zeros_like(b), b, b, (b * b).sum(1)[:, None]
        for hp in systems.products:
            now = step(*now, hp)
        solved: Tensor = now[0]
        return solved

    return call


def per_task(systems: Systems) -> Implementation:
    def call() -> Tensor:
        solved = []
        for task, b in enumerate(systems.b):
            now: State = torch.zeros_like(b), b, b, torch.dot(b, b)
            for hp in systems.products:
                now = one_task_step(*now, hp[task])
            solved.append(now[0])
        return torch.stack(solved)

    return call


class InJax:
    """All iterations in one jitted function, so that XLA can fuse across iterations."""

    def __init__(self, systems: Systems, peer: Any) -> None:
        self.solve = jitted_solve(peer)
        self.operands = peer.to_jax(systems.b), [peer.to_jax(hp) for hp in systems.products]

    def submit(self) -> Any:
        return self.solve(*self.operands)

    def __call__(self) -> Tensor:
        return torch.from_dlpack(self.submit().block_until_ready())


@cache
def jitted_solve(peer: Any) -> Any:
    def dot(u: Any, v: Any) -> Any:
        return peer.jnp.einsum("bd,bd->b", u, v)[:, None]  # in XLA faster than (u * v).sum(1)

    @peer.jax.jit
    def solve(b: Any, products: list[Any]) -> Any:
        x, r, p, rr = peer.jnp.zeros_like(b), b, b, dot(b, b)
        for hp in products:
            ap = hp + LAM * p
            alpha = rr / dot(p, ap)
            x, r = x + alpha * p, r - alpha * ap
            rr, old = dot(r, r), rr
            p = r + (rr / old) * p
        return x

    return solve


class Recorded:
    """`(H + lam I) p` from recorded products: zeros in the first call, then the next product."""

    def __init__(self, products: list[Tensor]) -> None:
        self.products = iter(products)
        self.started = False

    def __call__(self, p: Tensor) -> Tensor:
        if not self.started:
            self.started = True
            return torch.zeros_like(p)
        return torch.add(next(self.products), p, alpha=LAM)


def in_torchopt(systems: Systems) -> Implementation:
    """One system at a time: systems solved at once would share a step length."""
    import torchopt

    iterations = len(systems.products)

    def call() -> Tensor:
        solved = []
        for task, b in enumerate(systems.b):
            matvec = Recorded([hp[task] for hp in systems.products])
            solved.append(torchopt.linalg.cg(matvec, b, rtol=0.0, atol=0.0, maxiter=iterations))
        return torch.stack(solved)

    return call


def in_linear_operator(systems: Systems) -> Implementation:
    """Its batched solver, with a tolerance that it cannot reach, so that it does not stop early."""
    from linear_operator.utils.linear_cg import linear_cg
    from linear_operator.utils.warnings import NumericalWarning

    columns = [
        hp[..., None] for hp in systems.products
    ]  # its right-hand sides are columns, [B, D, 1]

    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)  # the tolerance was not reached
            solved: Tensor = linear_cg(
                Recorded(columns), systems.b[..., None], tolerance=0.0, stop_updating_after=0.0,
                eps=1e-30, max_iter=len(columns), max_tridiag_iter=0,
            )  # fmt: skip
        return solved[..., 0]

    return call


def make_implementations(systems: Systems, rotation: int) -> tuple[Implementation, Implementations]:
    """A function that resets the operands, and {name: implementation}, on `rotation` copies."""
    every = [systems, *(systems.clone() for _ in range(rotation - 1))]
    ours = [Fused(each) for each in every]
    compiled = torch.compile(batched_step, dynamic=False)
    made: Implementations = {
        "imaml_ext": Rotated(ours),
        "plain batched PyTorch": Rotated([batched(each) for each in every]),
        "compiled batched PyTorch": Rotated([batched(each, compiled) for each in every]),
        "the authors' loop over tasks": Rotated([per_task(each) for each in every]),
    }
    peer = jax_peer(systems.b.device)
    if peer is not None:
        made["JAX, jit"] = Rotated([InJax(each, peer) for each in every])
    if has_peer("torchopt"):
        made["TorchOpt, loop over tasks"] = Rotated([in_torchopt(each) for each in every])
    if has_peer("linear_operator"):
        made["linear_operator, linear_cg"] = Rotated([in_linear_operator(each) for each in every])

    def prepare() -> None:
        for each in ours:
            each.prepare()

    return prepare, made


def with_graphs(made: Implementations, device: torch.device) -> Implementations:
    """Adds imaml_ext and plain PyTorch as CUDA graphs, on CUDA."""
    if device.type == "cpu":
        return made
    graphs: Implementations = {}
    for name in filter(made.get, GRAPHED):
        graphs |= captured(name, made[name])
    return made | graphs


def check_work(ours: Rotated, prepare: Implementation, iterations: int) -> None:
    """Exits unless every row took all iterations: a frozen row does no work."""
    prepare()
    for fused in ours.calls:
        fused()
        if not (fused.steps == iterations).all():
            raise SystemExit(f"some rows stopped early: {fused.steps.tolist()} steps")


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.add_argument("--tasks", type=int, default=16)
    options.add_argument("--dim", type=int, default=113221)
    options.add_argument("--iterations", type=int, default=5)
    options.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    chosen = options.parse_args()
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    tasks, dim, iterations = chosen.tasks, chosen.dim, chosen.iterations

    def systems(dtype: torch.dtype) -> Systems:
        like = torch.empty((), dtype=dtype, device=device)
        return Systems.make(tasks, dim, iterations, like)

    # Buffers: x, r, p and one product per iteration.
    element = torch.finfo(dtype).bits // 8
    footprint = (3 + iterations) * tasks * dim * element
    with torch.no_grad():
        prepare, every = make_implementations(systems(torch.float64), 1)
        every = leave_out(every, chosen.without)
        check_agreement(every, prepare, 1e-10)
        prepare, made = make_implementations(systems(dtype), copies(footprint, device))
        made = {name: call for name, call in made.items() if name in every}
        first_call = {}
        for name, call in made.items():
            prepare()
            first_call[name] = seconds(call, device)
        made = with_graphs(made, device)
        check_agreement(made, prepare, 1e-4 if dtype == torch.float32 else 1e-10)
        check_work(made["imaml_ext"], prepare, iterations)
        timings = time_in_turn(made, prepare, device, chosen.rounds)
        copy = copy_bandwidth(footprint, device, chosen.rounds)
    moved = 7 * iterations * tasks * dim * element
    rows = {}
    print(f"{iterations} CG iterations, B={tasks}, D={dim}, {chosen.dtype}, {device}")
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s")
    for name, timing in timings.items():
        ratio = timing["median"] / timings["imaml_ext"]["median"]
        rows[name] = timing | {"share_of_copy_bandwidth": moved / timing["median"] / copy}
        if "compiled" in name or "jit" in name:
            rows[name]["compile"] = first_call[name] - timing["median"]
        print(
            f"{name:30s} {1e3 * timing['median']:8.2f} ms "
            f"[{1e3 * timing['min']:.2f}, {1e3 * timing['max']:.2f}], {ratio:5.2f}x imaml_ext, "
            f"{100 * rows[name]['share_of_copy_bandwidth']:.0f}% of copy bandwidth"
        )
    settings = {"tasks": tasks, "dim": dim, "iterations": iterations, "dtype": chosen.dtype}
    report(
        {**provenance("cg", device, settings), "copy_bandwidth": copy, "implementations": rows},
        chosen.json,
    )


if __name__ == "__main__":
    main()
