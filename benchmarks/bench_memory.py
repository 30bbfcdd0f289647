"""How does the memory of a meta-gradient depend on the numbers of inner and CG steps?

Measures the peak number of bytes that one meta-gradient of the batch allocates: by torch's
accounting, or for JAX the compiler's reservation for temporaries. Implicit gradients should need
the same memory for any number of steps; MAML keeps the graph of every inner step. The loops hold
one task at a time, the other implementations the whole batch.
"""

from collections.abc import Callable

import torch
from harness import (
    Implementation,
    add_without,
    has_peer,
    jax_peer,
    leave_out,
    parser,
    provenance,
    report,
)
from torch_meta_gradient import IMPLEMENTATIONS, check_work
from workload import WORKLOADS, Workload, make_workload

from imaml_ext import MAML, GradientDescent
from imaml_ext.data.tasks import TaskBatch
from imaml_ext.experiments.reproduce.memory import peak_bytes

MAML_NAME = "MAML, back-propagation through the steps"


def maml(workload: Workload) -> Implementation:
    """MAML, which has no CG steps."""
    w = workload
    inner = GradientDescent(lr=w.lr, steps=w.inner_steps)
    method = MAML(w.loss, w.params, inner=inner, lam=w.lam)
    batch = TaskBatch(w.support, w.query)
    return lambda: method.meta_gradient(batch)


def measures(workload: Workload, device: torch.device) -> dict[str, Callable[[], int]]:
    """{name: function that measures the peak bytes of the workload}."""

    def by_torch(call: Implementation) -> Callable[[], int]:
        return lambda: peak_bytes(call, device)

    made = {
        name: by_torch(make(workload))
        for name, make in IMPLEMENTATIONS.items()
        if "compiled" not in name and "recorded" not in name
    }
    made[MAML_NAME] = by_torch(maml(workload))
    if has_peer("torchopt"):
        import torchopt_meta_gradient

        made["TorchOpt, loop over tasks"] = by_torch(
            torchopt_meta_gradient.implementation(workload)
        )
    peer = jax_peer(device)
    if peer is not None:
        for name, formulation in peer.formulations(workload).items():
            if "lax.conv" not in name:  # these are slow
                made[name] = formulation.temporary_bytes
    return made


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.add_argument("--workload", choices=WORKLOADS, default="omniglot-5w1s")
    options.add_argument("--inner-steps", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--cg-steps", type=int, nargs="+", default=[1, 4, 8])
    options.add_argument("--tasks", type=int, help="default: the workload's")
    options.add_argument("--width", type=int, help="of the network; default: the workload's")
    chosen = options.parse_args()
    device = torch.device(chosen.device)

    def peaks(inner_steps: int, cg_steps: int) -> dict[str, int]:
        workload = make_workload(
            chosen.workload, device, torch.float32, inner_steps=inner_steps, cg_steps=cg_steps,
            tasks=chosen.tasks, width=chosen.width,
        )  # fmt: skip
        check_work(workload)
        kept = leave_out(measures(workload, device), chosen.without)
        return {name: measure() for name, measure in kept.items()}

    one_cg, one_inner = min(chosen.cg_steps), min(chosen.inner_steps)
    over_inner = {steps: peaks(steps, one_cg) for steps in chosen.inner_steps}
    over_cg = {steps: peaks(one_inner, steps) for steps in chosen.cg_steps}
    workload = make_workload(
        chosen.workload, device, torch.float32, tasks=chosen.tasks, width=chosen.width
    )
    print(f"{chosen.workload}, {workload.tasks} tasks, D={workload.layout.dim}, {device}; MiB")
    rows = {}
    for name in over_inner[chosen.inner_steps[0]]:
        inner = {steps: peak[name] for steps, peak in over_inner.items()}
        cg = {steps: peak[name] for steps, peak in over_cg.items() if name != MAML_NAME}
        rows[name] = {"over_inner_steps": inner, "over_cg_steps": cg}
        print(
            f"{name:42s} inner steps: {_series(inner)};"
            + (f" CG steps: {_series(cg)}" if cg else "")
        )
    settings = {
        "workload": chosen.workload,
        "tasks": workload.tasks,
        "dim": workload.layout.dim,
        "cg_steps_over_inner": one_cg,
        "inner_steps_over_cg": one_inner,
    }
    report({**provenance("memory", device, settings), "implementations": rows}, chosen.json)


def _series(peaks: dict[int, int]) -> str:
    text = ", ".join(f"{steps}: {peak / 2**20:.1f}" for steps, peak in peaks.items())
    return f"{text}, last over first {peaks[max(peaks)] / peaks[min(peaks)]:.2f}x"


if __name__ == "__main__":
    main()
