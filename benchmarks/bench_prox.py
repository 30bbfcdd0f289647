"""How fast is a fused proximal step of gradient descent or Adam, compared with alternatives?

Times a step on [B, D] rows with given gradients. torch.optim has no proximal term, but its weight
decay is one in the variable `phi - theta`: it is timed on this variable, on one tensor, which also
saves it from reading theta. The fraction of copy bandwidth counts the unavoidable passes: gradient
descent reads phi and the gradient and writes phi; Adam also reads and writes its two moments. On
CUDA, operands are used in turn and CUDA graphs are timed too, as in bench_cg.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from cuda_timing import Implementation, Rotated, captured, copies
from harness import (
    Implementations,
    add_without,
    check_agreement,
    copy_bandwidth,
    jax_peer,
    leave_out,
    parser,
    provenance,
    report,
    time_in_turn,
)
from torch import Tensor

from imaml_ext.ops import prox_adam_, prox_gd_

LAM, LR, BETA1, BETA2, EPS = 2.0, 0.01, 0.9, 0.999, 1e-8
GRAPHED = ("imaml_ext", "plain PyTorch")
PASSES = {"gd": 3, "adam": 7}


def gd_step(phi: Any, grad: Any, theta: Any) -> tuple[Any]:
    return (phi - LR * (grad + LAM * (phi - theta)),)


def adam_step(phi: Any, grad: Any, theta: Any, first: Any, second: Any) -> tuple[Any, Any, Any]:
    """The first step, so that the bias corrections are `1 - beta`."""
    g = grad + LAM * (phi - theta)
    first = BETA1 * first + (1 - BETA1) * g
    second = BETA2 * second + (1 - BETA2) * g * g
    displacement = first / (1 - BETA1) / ((second / (1 - BETA2)) ** 0.5 + EPS)
    return phi - LR * displacement, first, second


STEPS: dict[str, Callable[..., Any]] = {"gd": gd_step, "adam": adam_step}


@dataclass(frozen=True)
class Problem:
    """The operands of a step: phi and the gradients, [B, D], and theta, [D]."""

    kind: str
    theta: Tensor
    grad: Tensor
    start: Tensor

    @staticmethod
    def make(kind: str, tasks: int, dim: int, like: Tensor) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        theta, grad, displacement = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((dim,), (tasks, dim), (tasks, dim))
        )
        return Problem(kind, theta.to(like), grad.to(like), (theta + 0.1 * displacement).to(like))

    def clone(self) -> "Problem":
        return Problem(self.kind, self.theta.clone(), self.grad.clone(), self.start.clone())


class Candidate(Protocol):
    """An implementation of the step; `prepare` resets the operands, `phi` is read afterwards."""

    def prepare(self) -> None: ...

    def __call__(self) -> Any: ...

    def phi(self) -> Tensor: ...


class Fused:
    """`prox_gd_` or `prox_adam_`, in place."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.lam = problem.theta.new_full((1,), LAM)
        self.rows = torch.empty_like(problem.start)
        self.first, self.second = torch.empty_like(self.rows), torch.empty_like(self.rows)

    def prepare(self) -> None:
        self.rows.copy_(self.problem.start)
        self.first.zero_()
        self.second.zero_()

    def __call__(self) -> None:
        at = self.problem
        if at.kind == "gd":
            prox_gd_(self.rows, at.grad, at.theta, self.lam, lr=LR)
        else:
            prox_adam_(
                self.rows, at.grad, at.theta, self.lam, lr=LR, first_moment=self.first,
                second_moment=self.second, beta1=BETA1, beta2=BETA2, eps=EPS, step=1,
            )  # fmt: skip

    def phi(self) -> Tensor:
        return self.rows


class Plain:
    """The formula in PyTorch, eager or compiled; out of place."""

    def __init__(self, problem: Problem, step: Callable[..., Any]) -> None:
        zeros = torch.zeros_like(problem.start)
        self.operands = [problem.start, problem.grad, problem.theta]
        if problem.kind == "adam":
            self.operands += [zeros, zeros.clone()]
        self.step = step
        self.stepped: Any = None

    def prepare(self) -> None:
        if self.stepped is not None and self.stepped[0].is_cuda:
            self.stepped[0].fill_(torch.nan)  # a graph's replay writes to this memory again
        else:
            self.stepped = None

    def __call__(self) -> None:
        self.stepped = self.step(*self.operands)

    def phi(self) -> Tensor:
        stepped: Tensor = self.stepped[0]
        return stepped


class TorchOptim:
    """torch.optim on `phi - theta` with weight decay, in place."""

    def __init__(self, problem: Problem, how: str) -> None:
        self.theta, self.displacement = problem.theta, problem.start - problem.theta
        self.parameter = torch.nn.Parameter(self.displacement.clone())
        self.parameter.grad = problem.grad
        settings: Any = {"lr": LR, "weight_decay": LAM, how: True}
        self.optimizer: torch.optim.Optimizer
        if problem.kind == "gd":
            self.optimizer = torch.optim.SGD([self.parameter], **settings)
        else:
            self.optimizer = torch.optim.Adam(
                [self.parameter], betas=(BETA1, BETA2), eps=EPS, **settings
            )

    def prepare(self) -> None:
        self.parameter.data.copy_(self.displacement)
        for value in self.optimizer.state[self.parameter].values():
            if isinstance(value, Tensor):
                value.zero_()

    def __call__(self) -> None:
        self.optimizer.step()

    def phi(self) -> Tensor:
        return self.parameter.detach() + self.theta


class Jitted:
    """The formula in JAX, jitted; phi and the moments are donated, so XLA can update in place."""

    def __init__(self, problem: Problem, peer: Any) -> None:
        self.copy = peer.jnp.copy
        adam = problem.kind == "adam"
        written = [problem.start] + [torch.zeros_like(problem.start)] * (2 if adam else 0)
        self.start = [peer.to_jax(tensor) for tensor in written]
        self.read = peer.to_jax(problem.grad), peer.to_jax(problem.theta)
        self.step = jitted_step(problem.kind, peer)

    def prepare(self) -> None:
        self.state = [self.copy(array) for array in self.start]
        for array in self.state:
            array.block_until_ready()

    def submit(self) -> Any:
        self.state = self.step(self.state, *self.read)
        return self.state[0]

    def __call__(self) -> None:
        self.submit()
        for array in self.state:
            array.block_until_ready()

    def phi(self) -> Tensor:
        return torch.from_dlpack(self.state[0])


@cache
def jitted_step(kind: str, peer: Any) -> Any:
    def reordered(state: list[Any], grad: Any, theta: Any) -> list[Any]:
        return list(STEPS[kind](state[0], grad, theta, *state[1:]))

    return peer.jax.jit(reordered, donate_argnums=0)


class Candidates:
    """One implementation, on each copy of the problem."""

    def __init__(self, make: Callable[[Problem], Candidate], problems: list[Problem]) -> None:
        self.each = [make(problem) for problem in problems]
        self.rotated = Rotated(self.each)

    def prepare(self) -> None:
        for candidate in self.each:
            candidate.prepare()

    def stepped(self, step: Implementation) -> Implementation:
        """phi of the first copy after `step`."""

        def call() -> Tensor:
            step()
            return self.each[0].phi()

        return call


def ways(kind: str, device: torch.device) -> dict[str, Callable[[Problem], Candidate]]:
    compiled = torch.compile(STEPS[kind], dynamic=False)
    made: dict[str, Callable[[Problem], Candidate]] = {
        "imaml_ext": Fused,
        "plain PyTorch": lambda problem: Plain(problem, STEPS[kind]),
        "compiled PyTorch": lambda problem: Plain(problem, compiled),
        "torch.optim, foreach": lambda problem: TorchOptim(problem, "foreach"),
        "torch.optim, fused": lambda problem: TorchOptim(problem, "fused"),
    }
    peer = jax_peer(device)
    if peer is not None:
        made["JAX, jit"] = lambda problem: Jitted(problem, peer)
    return made


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.add_argument("--step", choices=list(STEPS), default="gd")
    options.add_argument("--tasks", type=int, default=16)
    options.add_argument("--dim", type=int, default=113221)
    chosen = options.parse_args()
    device, tasks, dim = torch.device(chosen.device), chosen.tasks, chosen.dim

    moved = 4 * (PASSES[chosen.step] * tasks * dim + dim)
    made_by = leave_out(dict(ways(chosen.step, device)), chosen.without)

    def problems(dtype: torch.dtype, rotation: int) -> list[Problem]:
        like = torch.empty((), dtype=dtype, device=device)
        first = Problem.make(chosen.step, tasks, dim, like)
        return [first, *(first.clone() for _ in range(rotation - 1))]

    with torch.no_grad():
        for dtype, rotation, tolerance in (
            (torch.float64, 1, 1e-12),
            (torch.float32, copies(moved, device), 1e-6),
        ):
            at = problems(dtype, rotation)
            made = {name: Candidates(make, at) for name, make in made_by.items()}
            timed: Implementations = {name: each.rotated for name, each in made.items()}
            if device.type == "cuda" and dtype == torch.float32:
                for name in filter(made_by.get, GRAPHED):
                    own = Candidates(made_by[name], at)
                    for label, graph in captured(name, own.rotated).items():
                        made[label], timed[label] = own, graph

            def prepare(made: dict[str, Candidates] = made) -> None:
                for candidate in made.values():
                    candidate.prepare()

            results = {name: made[name].stepped(call) for name, call in timed.items()}
            check_agreement(results, prepare, tolerance)
        timings = time_in_turn(timed, prepare, device, chosen.rounds)
        copy = copy_bandwidth(moved, device, chosen.rounds)
    rows = {}
    print(f"a step of {chosen.step}, B={tasks}, D={dim}, float32, {device}")
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s")
    for name, timing in timings.items():
        ratio = timing["median"] / timings["imaml_ext"]["median"]
        rows[name] = timing | {"share_of_copy_bandwidth": moved / timing["median"] / copy}
        print(
            f"{name:22s} {1e3 * timing['median']:8.3f} ms "
            f"[{1e3 * timing['min']:.3f}, {1e3 * timing['max']:.3f}], {ratio:5.2f}x imaml_ext, "
            f"{100 * rows[name]['share_of_copy_bandwidth']:.0f}% of copy bandwidth"
        )
    settings = {"step": chosen.step, "tasks": tasks, "dim": dim, "dtype": "float32"}
    report(
        {**provenance("prox", device, settings), "copy_bandwidth": copy, "implementations": rows},
        chosen.json,
    )


if __name__ == "__main__":
    main()
