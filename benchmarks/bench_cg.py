"""How fast is the vector work of conjugate gradient, fused, against what one would write otherwise?

Five iterations on [B, D] systems, the products with H given: only what lies between them is timed.
Seven passes over memory are counted for an iteration, the floor, against the bandwidth of a copy of
the same footprint.
"""

import torch
from harness import (
    check_agreement,
    copy_bandwidth,
    parser,
    report,
    time_in_turn,
)
from torch import Tensor

from imaml_ext.ops import cg_step_, row_dot
from imaml_ext.provenance import describe_run

LAM = 2.0


def batched_step(
    x: Tensor, r: Tensor, p: Tensor, rr: Tensor, hp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One iteration in plain batched PyTorch."""
    ap = hp + LAM * p
    alpha = rr / (p * ap).sum(1, keepdim=True)
    x = x + alpha * p
    r = r - alpha * ap
    rr_new = (r * r).sum(1, keepdim=True)
    p = r + (rr_new / rr) * p
    return x, r, p, rr_new


def one_task_step(
    x: Tensor, r: Tensor, p: Tensor, rr: Tensor, hp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One iteration for one task, as the iMAML authors' code loops over tasks."""
    ap = hp + LAM * p
    alpha = rr / torch.dot(p, ap)
    x = x + alpha * p
    r = r - alpha * ap
    rr_new = torch.dot(r, r)
    p = r + (rr_new / rr) * p
    return x, r, p, rr_new


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", type=int, default=16)
    options.add_argument("--dim", type=int, default=113221)
    options.add_argument("--iterations", type=int, default=5)
    options.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    chosen = options.parse_args()
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    tasks, dim, iterations = chosen.tasks, chosen.dim, chosen.iterations
    torch.manual_seed(0)

    # The products of a true solve, H = diag(h), recorded once.
    b = torch.randn(tasks, dim, dtype=dtype, device=device)
    h = 10 * torch.rand(tasks, dim, dtype=dtype, device=device)
    products = []
    state = torch.zeros_like(b), b, b, (b * b).sum(1, keepdim=True)
    for _ in range(iterations):
        products.append(h * state[2])
        state = batched_step(*state, products[-1])

    lam = torch.full((1,), LAM, dtype=dtype, device=device)
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr, tol2 = row_dot(b, b), torch.zeros(tasks, dtype=torch.float64, device=device)
    status = torch.zeros(tasks, dtype=torch.int32, device=device)
    steps = torch.zeros_like(status)
    curvature, beta = torch.empty(2, tasks, dtype=torch.float64, device=device)
    first_rr = rr.clone()

    def prepare() -> None:
        x.zero_()
        r.copy_(b)
        p.copy_(b)
        rr.copy_(first_rr)
        status.zero_()
        steps.zero_()

    def fused() -> Tensor:
        for hp in products:
            cg_step_(
                x, r, p, hp, lam, damping=0.0, rr=rr, tol2=tol2, status=status, steps=steps,
                curvature=curvature, beta=beta,
            )  # fmt: skip
        return x

    def batched(step=batched_step) -> Tensor:  # type: ignore[no-untyped-def]
        now = torch.zeros_like(b), b, b, first_rr.to(dtype)[:, None]
        for hp in products:
            now = step(*now, hp)
        return now[0]

    def per_task() -> Tensor:
        solved = []
        for task in range(tasks):
            now = torch.zeros_like(b[task]), b[task], b[task], torch.dot(b[task], b[task])
            for hp in products:
                now = one_task_step(*now, hp[task])
            solved.append(now[0])
        return torch.stack(solved)

    compiled_step = torch.compile(batched_step, dynamic=False)
    implementations = {
        "fused": fused,
        "plain batched PyTorch": batched,
        "compiled batched PyTorch": lambda: batched(compiled_step),
        "per-task loop (the authors')": per_task,
    }
    with torch.no_grad():
        check_agreement(implementations, prepare, 1e-4 if dtype == torch.float32 else 1e-10)
        prepare()
        fused()
        assert (steps == iterations).all(), "rows froze: the work was not done"
        timings = time_in_turn(implementations, prepare, device, chosen.rounds)
        # Seven passes are the floor; the buffers in play are x, r, p and a product per iteration.
        footprint = (3 + iterations) * b.numel() * b.element_size()
        copy = copy_bandwidth(footprint, device, chosen.rounds)
    moved = 7 * iterations * b.numel() * b.element_size()
    rows = {}
    print(f"{iterations} CG iterations, B={tasks}, D={dim}, {chosen.dtype}, {device}")
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s")
    for name, timing in timings.items():
        rows[name] = timing | {
            "speedup_of_fused": timing["median"] / timings["fused"]["median"],
            "share_of_copy_bandwidth": moved / timing["median"] / copy,
        }
        print(
            f"{name:30s} {1e3 * timing['median']:8.2f} ms "
            f"[{1e3 * timing['min']:.2f}, {1e3 * timing['max']:.2f}]  "
            f"fused is {rows[name]['speedup_of_fused']:.2f}x as fast, "
            f"{100 * rows[name]['share_of_copy_bandwidth']:.0f}% of copy bandwidth"
        )
    settings = {"tasks": tasks, "dim": dim, "iterations": iterations, "dtype": chosen.dtype}
    report(
        {"benchmark": "cg", **describe_run(device), "settings": settings, "copy_bandwidth": copy,
         "implementations": rows},
        chosen.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
