"""How fast is the meta-gradient of a batch of tasks, compared with other implementations?

Compares with loops over tasks (one of them in TorchOpt), with batched PyTorch without this
package's kernels and without retaining the gradient's graph, and with JAX. JAX's formulations are
first compared with each other, and the fastest takes part. Compile time is not included in the
times; it is reported separately, as the difference between the first call and the median.

The flop count is that of a loop that builds the gradient's graph once: `inner_steps + 2` gradients
and `cg_steps` products per task. The table lists the fraction of the measured rate of a matrix
product.
"""

import os
from unittest import mock

import torch
from cuda_timing import captured
from harness import (
    Implementation,
    Implementations,
    add_without,
    check_agreement,
    has_peer,
    jax_peer,
    leave_out,
    matmul_rate,
    parser,
    provenance,
    report,
    seconds,
    time_in_turn,
)
from tf32 import EmulatedTF32
from torch.utils.flop_counter import FlopCounterMode
from torch_meta_gradient import IMPLEMENTATIONS, batched_eager, check_work, library
from workload import WORKLOADS, Workload, make_workload

from imaml_ext.problem.objective import Objective


def torch_implementations(workload: Workload) -> Implementations:
    """{name: implementation}. On CUDA, plain batched PyTorch is also captured as a CUDA graph."""
    made = {name: make(workload) for name, make in IMPLEMENTATIONS.items()}
    if workload.theta.is_cuda:
        made |= captured("batched PyTorch", batched_eager(workload))
    if has_peer("torchopt"):
        import torchopt_meta_gradient

        made["TorchOpt, loop over tasks"] = torchopt_meta_gradient.implementation(workload)
    return made


def jax_formulations(workload: Workload) -> Implementations:
    peer = jax_peer(workload.theta.device)
    return {} if peer is None else dict(peer.formulations(workload))


def screen(
    formulations: Implementations, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the first call of each formulation, and of the fastest of three later calls.

    A formulation that is over three times slower than the fastest so far is not called again.
    """
    first = {name: seconds(call, device) for name, call in formulations.items()}
    fastest = {name: seconds(call, device) for name, call in formulations.items()}
    for _ in range(2):
        for name, call in formulations.items():
            if fastest[name] < 3 * min(fastest.values()):
                fastest[name] = min(fastest[name], seconds(call, device))
    return first, fastest


def count_flops(workload: Workload) -> int:
    """Flops of the convolutions and matrix products, for all tasks."""
    support, _ = workload.task(0)
    phi = {name: t.detach().clone().requires_grad_() for name, t in workload.params.items()}
    leaves = list(phi.values())
    with FlopCounterMode(display=False) as of_gradient:
        gradients = torch.autograd.grad(workload.loss(phi, support), leaves, create_graph=True)
    with FlopCounterMode(display=False) as of_product:
        torch.autograd.grad(gradients, leaves, [torch.ones_like(g) for g in gradients])
    one_task = (workload.inner_steps + 2) * of_gradient.get_total_flops()
    one_task += workload.cg_steps * of_product.get_total_flops()
    return workload.tasks * one_task


def set_precision(device: torch.device, tf32: bool) -> None:
    """The same precision for all on CUDA, where the defaults of torch and JAX differ."""
    if device.type == "cuda":
        # The settings since torch 2.9; reading `allow_tf32` once these are set raises.
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        peer = jax_peer(device)
        if peer is not None:
            precision = "tensorfloat32" if tf32 else "float32"
            peer.jax.config.update("jax_default_matmul_precision", precision)


def hessian_product(workload: Workload) -> Implementation:
    """Hessian-vector products of all tasks at theta, with the same vector for both dtypes."""
    w = workload
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(w.tasks, w.layout.dim, dtype=torch.float64, generator=generator).to(w.theta)
    objective = Objective(w.loss, w.layout, w.support)
    rows = w.theta.expand(w.tasks, -1).clone()
    return lambda: objective.linearise(rows, "hessian").matvec(v)


def rounding_errors(workload: Workload, exact: Workload) -> dict[str, dict[str, float]]:
    """{precision of products: {quantity: relative error}}, for the library."""
    device = workload.theta.device
    makers = {"meta-gradient": library, "Hessian product": hessian_product}
    wanted = {name: make(exact)() for name, make in makers.items()}

    def now() -> dict[str, float]:
        got = {name: make(workload)().double() for name, make in makers.items()}
        return {name: ((got[name] - x).norm() / x.norm()).item() for name, x in wanted.items()}

    errors = {}
    set_precision(device, False)
    errors["float32"] = now()
    if device.type == "cuda":
        set_precision(device, True)
        errors["TF32"] = now()
        set_precision(device, False)
    else:  # convolutions are computed by matrix products, as on CUDA
        with mock.patch.dict(os.environ, IMAML_LAYERS="patches"), EmulatedTF32():
            errors["TF32, emulated"] = now()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        errors["bfloat16 by autocast"] = now()
    return errors


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.add_argument("--workload", choices=WORKLOADS, default="omniglot-5w1s")
    options.add_argument("--inner-steps", type=int, default=16)
    options.add_argument("--cg-steps", type=int, default=5)
    options.add_argument("--tasks", type=int, help="default: the workload's")
    options.add_argument("--width", type=int, help="of the network; default: the workload's")
    options.add_argument("--tf32", action="store_true", help="use TF32 products, on CUDA")
    options.add_argument("--errors", action="store_true", help="measure rounding errors as well")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    sizes = {"inner_steps": chosen.inner_steps, "cg_steps": chosen.cg_steps, "width": chosen.width}

    # Compare in float64, where only a mistake makes a difference; two tasks reveal a mix-up.
    few = make_workload(
        chosen.workload, device, torch.float64, tasks=min(chosen.tasks or 2, 2), **sizes
    )
    set_precision(device, False)
    every = leave_out(torch_implementations(few) | jax_formulations(few), chosen.without)
    check_agreement(every, lambda: None, 1e-8)

    set_precision(device, chosen.tf32)
    workload = make_workload(chosen.workload, device, torch.float32, tasks=chosen.tasks, **sizes)
    check_work(workload)
    implementations = {
        name: call for name, call in torch_implementations(workload).items() if name in every
    }
    formulations = {
        name: call for name, call in jax_formulations(workload).items() if name in every
    }
    first_call = {name: seconds(call, device) for name, call in implementations.items()}
    tried: dict[str, float] = {}
    if formulations:
        first_jax, tried = screen(formulations, device)
        best: str = min(tried, key=lambda name: tried[name])
        best_call: Implementation = formulations[best]
        implementations[best], first_call[best] = best_call, first_jax[best]
    timings = time_in_turn(implementations, lambda: None, device, chosen.rounds, warm_up=1)
    flops, rate = count_flops(workload), matmul_rate(device, chosen.rounds)

    settings = workload.settings() | {"tf32": chosen.tf32}
    print(", ".join(f"{key} {value}" for key, value in settings.items()) + f", {device}")
    print(f"{flops / 1e9:.2f} Gflop; rate of a matrix product: {rate / 1e9:.0f} Gflop/s")
    for name, took in tried.items():
        print(f"tried: {name:45s} {1e3 * took:9.1f} ms")
    rows = {}
    for name, timing in timings.items():
        ratio = timing["median"] / timings["imaml_ext"]["median"]
        rows[name] = timing | {"share_of_matmul": flops / timing["median"] / rate}
        if any(kind in name for kind in ("compiled", "recorded", "JAX")):
            rows[name]["compile"] = first_call[name] - timing["median"]
        print(
            f"{name:42s} {1e3 * timing['median']:9.1f} ms "
            f"[{1e3 * timing['min']:.1f}, {1e3 * timing['max']:.1f}], {ratio:6.2f}x imaml_ext, "
            f"{100 * rows[name]['share_of_matmul']:3.0f}% of a matrix product's rate"
            + (f", compile time {rows[name]['compile']:.1f} s" if "compile" in rows[name] else "")
        )
    errors: dict[str, dict[str, float]] = {}
    if chosen.errors:
        exact = make_workload(chosen.workload, device, torch.float64, tasks=chosen.tasks, **sizes)
        errors = rounding_errors(workload, exact)
        for precision, of in errors.items():
            listed = ", ".join(f"{name} {error:.1e}" for name, error in of.items())
            print(f"relative errors, products in {precision}: {listed}")
    report(
        {**provenance("meta_grad", device, settings), "flops": flops, "matmul_rate": rate,
         "tried": tried, "implementations": rows, "errors": errors},
        chosen.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
