"""How fast is a complete meta-gradient of a batch, against a lean loop over its tasks?

The loop is imaml_ext/reference.py: plain PyTorch, one task at a time, the graph of the gradient
built anew in every Hessian-vector product, as in all published implementations.
"""

import torch
from harness import check_agreement, describe_run, parser, report, time_in_turn
from torch import Tensor, nn

from imaml_ext import (
    ConjugateGradient,
    GradientDescent,
    Status,
    implicit_meta_grad,
    module_loss,
    reference,
)
from imaml_ext.data import Sinusoid
from imaml_ext.flat import Layout
from imaml_ext.models import conv4, mlp
from imaml_ext.tasks import TaskBatch

# way, shot, tasks
IMAGES = {
    "omniglot-5w1s": (5, 1, 16),
    "omniglot-20w1s": (20, 1, 16),
    "omniglot-20w5s": (20, 5, 4),
}
# Strong enough that every task has positive curvature, so that no solve ends early.
LAM = 50.0


def make_workload(name: str, device: torch.device) -> tuple[nn.Module, nn.Module, TaskBatch]:
    if name == "sinusoid":
        return mlp(1, 40, 40, 1), nn.MSELoss(), Sinusoid(tasks=25, device=device).sample(0)
    way, shot, tasks = IMAGES[name]

    def part() -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, way * shot, 1, 28, 28, device=device)
        return x, torch.arange(way, device=device).repeat_interleave(shot).expand(tasks, -1)

    return conv4(way), nn.CrossEntropyLoss(), TaskBatch(part(), part())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--workload", choices=["sinusoid", *IMAGES], default="omniglot-5w1s")
    options.add_argument("--inner-steps", type=int, default=16)
    options.add_argument("--cg-steps", type=int, default=5)
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    model, criterion, batch = make_workload(chosen.workload, device)
    loss = module_loss(model.to(device), criterion)
    params = dict(model.named_parameters())
    layout = Layout(params)
    theta = layout.flatten(params).detach()
    lam, lr = torch.full((1,), LAM, device=device), 0.5 / LAM
    tasks = batch.support[0].shape[0]

    def batched() -> Tensor:
        out = implicit_meta_grad(
            loss, params, batch.support, batch.query, lam=LAM,
            inner=GradientDescent(lr=lr, steps=chosen.inner_steps),
            cg=ConjugateGradient(max_iter=chosen.cg_steps),
        )  # fmt: skip
        if device.type == "cpu":
            assert (out.cg.status == Status.MAX_ITER).all(), "a solve ended early: work not done"
        return layout.flatten(out.params)

    def one_loss(row: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return loss(layout.unflatten(row), data)

    def looped() -> Tensor:
        total = torch.zeros_like(theta)
        for task in range(tasks):
            support, query = (
                tuple(tensor[task] for tensor in data) for data in (batch.support, batch.query)
            )
            total += reference.implicit_meta_gradient(
                one_loss, theta, support, query, lam,
                lr=lr, inner_steps=chosen.inner_steps, cg_steps=chosen.cg_steps,
            )[0]  # fmt: skip
        return total / tasks

    implementations = {"imaml_ext": batched, "per-task loop": looped}
    check_agreement(implementations, lambda: None, 2e-3)
    timings = time_in_turn(implementations, lambda: None, device, chosen.rounds)
    ratio = timings["per-task loop"]["median"] / timings["imaml_ext"]["median"]
    print(
        f"{chosen.workload}: {tasks} tasks, D={layout.dim}, {chosen.inner_steps} inner steps, "
        f"{chosen.cg_steps} CG steps, {device}"
    )
    for name, timing in timings.items():
        print(
            f"{name:15s} {1e3 * timing['median']:9.1f} ms "
            f"[{1e3 * timing['min']:.1f}, {1e3 * timing['max']:.1f}]"
        )
    print(f"imaml_ext is {ratio:.2f}x as fast")
    settings = {
        "workload": chosen.workload,
        "tasks": tasks,
        "dim": layout.dim,
        "inner_steps": chosen.inner_steps,
        "cg_steps": chosen.cg_steps,
    }
    report(
        {"benchmark": "meta_grad", **describe_run(device), "settings": settings,
         "implementations": timings, "speedup": ratio},
        chosen.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
