"""How fast is a proximal step of gradient descent or of Adam, fused, against what else there is?

A step on [B, D] rows, the gradients given. torch.optim takes no proximal term, but its weight decay
is one in the variable `phi - theta`: it is timed there, on one tensor, which also spares it reading
theta. Counted are the passes that cannot be saved: gradient descent reads phi and the gradient and
writes phi, Adam reads and writes its two moments too; against the bandwidth of a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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
PASSES = {"gd": 3, "adam": 7}


def gd_step(phi: Any, grad: Any, theta: Any) -> tuple[Any]:
    return (phi - LR * (grad + LAM * (phi - theta)),)


def adam_step(phi: Any, grad: Any, theta: Any, first: Any, second: Any) -> tuple[Any, Any, Any]:
    """The first step, `step = 1`: the bias corrections are `1 - beta`."""
    g = grad + LAM * (phi - theta)
    first = BETA1 * first + (1 - BETA1) * g
    second = BETA2 * second + (1 - BETA2) * g * g
    away = first / (1 - BETA1) / ((second / (1 - BETA2)) ** 0.5 + EPS)
    return phi - LR * away, first, second


STEPS: dict[str, Callable[..., Any]] = {"gd": gd_step, "adam": adam_step}


@dataclass(frozen=True)
class Problem:
    """Where a step starts from: phi and the gradients, [B, D], and theta, [D]."""

    kind: str
    theta: Tensor
    grad: Tensor
    start: Tensor

    @staticmethod
    def make(kind: str, tasks: int, dim: int, like: Tensor) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        theta, grad, away = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((dim,), (tasks, dim), (tasks, dim))
        )
        return Problem(kind, theta.to(like), grad.to(like), (theta + 0.1 * away).to(like))


class Candidate(Protocol):
    """A way to make the step; `prepare` goes back to the start, `phi` is read after the step."""

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
    """The formula in PyTorch, as it is or compiled; it returns what it computes."""

    def __init__(self, problem: Problem, compiled: Callable[[Any], Any] = lambda f: f) -> None:
        zeros = torch.zeros_like(problem.start)
        self.operands = [problem.start, problem.grad, problem.theta]
        if problem.kind == "adam":
            self.operands += [zeros, zeros.clone()]
        self.step = compiled(STEPS[problem.kind])
        self.stepped: Any = None

    def prepare(self) -> None:
        self.stepped = None

    def __call__(self) -> None:
        self.stepped = self.step(*self.operands)

    def phi(self) -> Tensor:
        stepped: Tensor = self.stepped[0]
        return stepped


class TorchOptim:
    """torch.optim on `phi - theta` with weight decay, in place."""

    def __init__(self, problem: Problem, how: str) -> None:
        self.theta, self.away = problem.theta, problem.start - problem.theta
        self.parameter = torch.nn.Parameter(self.away.clone())
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
        self.parameter.data.copy_(self.away)
        for value in self.optimizer.state[self.parameter].values():
            if isinstance(value, Tensor):
                value.zero_()

    def __call__(self) -> None:
        self.optimizer.step()

    def phi(self) -> Tensor:
        return self.parameter.detach() + self.theta


class Jitted:
    """The formula in JAX, jitted; phi and the moments are donated, so it may work in place."""

    def __init__(self, problem: Problem, peer: Any) -> None:
        self.copy = peer.jnp.copy
        adam = problem.kind == "adam"
        written = [problem.start] + [torch.zeros_like(problem.start)] * (2 if adam else 0)
        self.start = [peer.to_jax(tensor) for tensor in written]
        self.read = peer.to_jax(problem.grad), peer.to_jax(problem.theta)
        step = STEPS[problem.kind]

        def reordered(state: list[Any], grad: Any, theta: Any) -> list[Any]:
            return list(step(state[0], grad, theta, *state[1:]))

        self.step = peer.jax.jit(reordered, donate_argnums=0)

    def prepare(self) -> None:
        self.state = [self.copy(array) for array in self.start]
        for array in self.state:
            array.block_until_ready()

    def __call__(self) -> None:
        self.state = self.step(self.state, *self.read)
        for array in self.state:
            array.block_until_ready()

    def phi(self) -> Tensor:
        return torch.from_dlpack(self.state[0])


def make_candidates(problem: Problem) -> dict[str, Candidate]:
    def compiled(step: Any) -> Any:
        return torch.compile(step, dynamic=False)

    made: dict[str, Candidate] = {
        "imaml_ext": Fused(problem),
        "plain PyTorch": Plain(problem),
        "compiled PyTorch": Plain(problem, compiled),
        "torch.optim, foreach": TorchOptim(problem, "foreach"),
        "torch.optim, fused": TorchOptim(problem, "fused"),
    }
    peer = jax_peer(problem.theta.device)
    if peer is not None:
        made["JAX, jit"] = Jitted(problem, peer)
    return made


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.add_argument("--step", choices=list(STEPS), default="gd")
    options.add_argument("--tasks", type=int, default=16)
    options.add_argument("--dim", type=int, default=113221)
    chosen = options.parse_args()
    device, tasks, dim = torch.device(chosen.device), chosen.tasks, chosen.dim

    def candidates(dtype: torch.dtype) -> dict[str, Candidate]:
        like = torch.empty((), dtype=dtype, device=device)
        made = make_candidates(Problem.make(chosen.step, tasks, dim, like))
        kept = leave_out(dict(made), chosen.without)
        return {name: made[name] for name in kept}

    def prepare(made: dict[str, Candidate]) -> None:
        for candidate in made.values():
            candidate.prepare()

    def stepped(candidate: Candidate) -> Tensor:
        candidate()
        return candidate.phi()

    with torch.no_grad():
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            made = candidates(dtype)
            results: Implementations = {
                name: lambda candidate=candidate: stepped(candidate)
                for name, candidate in made.items()
            }
            check_agreement(results, lambda: prepare(made), tolerance)  # noqa: B023
        timings = time_in_turn(dict(made), lambda: prepare(made), device, chosen.rounds)
        moved = 4 * (PASSES[chosen.step] * tasks * dim + dim)
        copy = copy_bandwidth(moved, device, chosen.rounds)
    rows = {}
    print(f"a step of {chosen.step}, B={tasks}, D={dim}, float32, {device}")
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s")
    for name, timing in timings.items():
        ratio = timing["median"] / timings["imaml_ext"]["median"]
        rows[name] = timing | {"share_of_copy_bandwidth": moved / timing["median"] / copy}
        print(
            f"{name:22s} {1e3 * timing['median']:8.3f} ms "
            f"[{1e3 * timing['min']:.3f}, {1e3 * timing['max']:.3f}], {ratio:5.2f} of imaml_ext's, "
            f"{100 * rows[name]['share_of_copy_bandwidth']:.0f}% of copy bandwidth"
        )
    settings = {"step": chosen.step, "tasks": tasks, "dim": dim, "dtype": "float32"}
    report(
        {**provenance("prox", device, settings), "copy_bandwidth": copy, "implementations": rows},
        chosen.json,
    )


if __name__ == "__main__":
    main()
