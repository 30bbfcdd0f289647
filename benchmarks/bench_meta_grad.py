"""How fast is a complete meta-gradient of a batch, against a lean loop over its tasks?

The loop is imaml_ext/reference.py: plain PyTorch, one task at a time, the graph of the gradient
built anew in every Hessian-vector product, as in all published implementations.
"""

import torch
from harness import (
    Implementation,
    check_agreement,
    parser,
    report,
    time_in_turn,
)
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
from imaml_ext.provenance import describe_run
from imaml_ext.tasks import TaskBatch

# way, shot, tasks
IMAGES = {
    "omniglot-5w1s": (5, 1, 16),
    "omniglot-20w1s": (20, 1, 16),
    "omniglot-20w5s": (20, 5, 4),
}
# Strong enough that every task has positive curvature, so that no solve ends early.
LAM = 50.0


class Workload:
    """A batch of tasks, and its meta-gradient [D] computed both ways."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, inner_steps: int, cg_steps: int
    ) -> None:
        torch.manual_seed(0)
        self.inner_steps, self.cg_steps, self.lr = inner_steps, cg_steps, 0.5 / LAM
        model: nn.Module
        if name == "sinusoid":
            model, criterion = mlp(1, 40, 40, 1), nn.functional.mse_loss
            self.batch = Sinusoid(tasks=25, device=device, dtype=dtype).sample(0)
        else:
            way, shot, tasks = IMAGES[name]
            model, criterion = conv4(way), nn.functional.cross_entropy
            labels = torch.arange(way, device=device).repeat_interleave(shot).expand(tasks, -1)
            images = torch.rand(2, tasks, way * shot, 1, 28, 28, device=device).to(dtype)
            self.batch = TaskBatch((images[0], labels), (images[1], labels))
        self.loss = module_loss(model.to(device, dtype), criterion)
        self.params = dict(model.named_parameters())
        self.layout = Layout(self.params)
        self.theta = self.layout.flatten(self.params).detach()
        self.lam = torch.full((1,), LAM, dtype=dtype, device=device)
        self.tasks = self.batch.support[0].shape[0]

    def batched(self) -> Tensor:
        out = implicit_meta_grad(
            self.loss, self.params, self.batch.support, self.batch.query, lam=LAM,
            inner=GradientDescent(lr=self.lr, steps=self.inner_steps),
            cg=ConjugateGradient(max_iter=self.cg_steps),
        )  # fmt: skip
        self.status = out.cg.status
        return self.layout.flatten(out.params)

    def looped(self) -> Tensor:
        total = torch.zeros_like(self.theta)
        for task in range(self.tasks):
            support, query = (
                tuple(tensor[task] for tensor in data)
                for data in (self.batch.support, self.batch.query)
            )
            total += reference.implicit_meta_gradient(
                lambda row, data: self.loss(self.layout.unflatten(row), data),
                self.theta, support, query, self.lam,
                lr=self.lr, inner_steps=self.inner_steps, cg_steps=self.cg_steps,
            )[0]  # fmt: skip
        return total / self.tasks

    def implementations(self) -> dict[str, Implementation]:
        return {"imaml_ext": self.batched, "per-task loop": self.looped}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--workload", choices=["sinusoid", *IMAGES], default="omniglot-5w1s")
    options.add_argument("--inner-steps", type=int, default=16)
    options.add_argument("--cg-steps", type=int, default=5)
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    sizes = (chosen.inner_steps, chosen.cg_steps)

    # In float64, where the two can only differ by a mistake; then the clock, in float32.
    exact = Workload(chosen.workload, device, torch.float64, *sizes)
    check_agreement(exact.implementations(), lambda: None, 1e-8)
    workload = Workload(chosen.workload, device, torch.float32, *sizes)
    timings = time_in_turn(workload.implementations(), lambda: None, device, chosen.rounds)
    assert (workload.status == Status.MAX_ITER).all(), "a solve ended early: work not done"
    ratio = timings["per-task loop"]["median"] / timings["imaml_ext"]["median"]
    print(
        f"{chosen.workload}: {workload.tasks} tasks, D={workload.layout.dim}, "
        f"{chosen.inner_steps} inner steps, {chosen.cg_steps} CG steps, {device}"
    )
    for name, timing in timings.items():
        print(
            f"{name:15s} {1e3 * timing['median']:9.1f} ms "
            f"[{1e3 * timing['min']:.1f}, {1e3 * timing['max']:.1f}]"
        )
    print(f"imaml_ext is {ratio:.2f}x as fast")
    settings = {
        "workload": chosen.workload,
        "tasks": workload.tasks,
        "dim": workload.layout.dim,
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
