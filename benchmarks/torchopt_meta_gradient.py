"""The meta-gradient in TorchOpt: `custom_root` around the inner solver.

One task at a time, because its conjugate gradient solves one system. The derivative of the root
builds the gradient's graph once per task and uses it in all iterations.
"""

import warnings
from typing import Any

import torch
import torchopt
from harness import Implementation
from torch import Tensor
from torch.func import grad
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import solve_cg
from workload import Workload

from imaml_ext.problem.layout import Params

# TorchOpt still imports torch.func as functorch.
warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)


def implementation(workload: Workload) -> Implementation:
    w = workload
    names = list(w.params)
    Parts = tuple[Tensor, ...]

    def named(parts: Parts) -> Params:
        return dict(zip(names, parts, strict=True))

    support_gradient = grad(w.loss)

    def optimality(phi: Parts, theta: Parts, support: Any) -> Parts:
        at = support_gradient(named(phi), support)
        return tuple(
            at[name] + w.lam * (p - t) for name, p, t in zip(names, phi, theta, strict=True)
        )

    @custom_root(optimality, argnums=1, solve=solve_cg(maxiter=w.cg_steps, rtol=0.0, atol=0.0))
    def adapt(phi: Parts, theta: Parts, support: Any) -> Parts:
        descent = torchopt.sgd(lr=w.lr)
        state = descent.init(phi)
        for _ in range(w.inner_steps):
            leaves = tuple(p.detach().requires_grad_() for p in phi)
            with torch.enable_grad():
                gradients = torch.autograd.grad(w.loss(named(leaves), support), leaves)
            pulled = tuple(
                g + w.lam * (p - t) for g, p, t in zip(gradients, phi, theta, strict=True)
            )
            updates, state = descent.update(pulled, state, inplace=False)
            phi = torchopt.apply_updates(phi, updates, inplace=False)
        return phi

    def call() -> Tensor:
        theta = tuple(t.detach().requires_grad_() for t in w.params.values())
        total = torch.zeros_like(w.theta)
        for task in range(w.tasks):
            support, query = w.task(task)
            with torch.enable_grad():
                phi = adapt(tuple(t.detach() for t in theta), theta, support)
                gradients = torch.autograd.grad(w.loss(named(phi), query), theta)
            total += torch.cat([g.reshape(-1) for g in gradients])
        return total / w.tasks

    return call
