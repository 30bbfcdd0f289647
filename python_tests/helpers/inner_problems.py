"""Inner problems with every form of lam, and G of one task from its definition."""

import torch
from problems import regression

from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal

LAMS = ["scalar", "diagonal", "dense"]


def make_lam(form, theta):
    if form == "scalar":
        return torch.full((1,), 1.5, dtype=theta.dtype, device=theta.device)
    if form == "diagonal":
        return 1 + torch.rand_like(theta)
    root = torch.randn(len(theta), len(theta), dtype=theta.dtype, device=theta.device)
    return torch.eye(len(theta), dtype=theta.dtype, device=theta.device) + root @ root.T / len(
        theta
    )


def setting(device, tasks=4, form="scalar", make=regression):
    problem = make(tasks, device)
    theta = problem.layout.flatten(problem.params)
    objective = Objective(problem.loss, problem.layout, problem.support)
    return problem, Proximal(objective, theta, make_lam(form, theta))


def proximal_loss(problem, proximal, task, phi):
    """G of one task, from its definition."""
    data = tuple(t[task] for t in problem.support)
    displacement, lam = phi - proximal.theta, proximal.lam.values
    pull = lam @ displacement if lam.dim() == 2 else lam * displacement
    return problem.flat_loss(phi, data) + 0.5 * displacement @ pull


def gradient_norms(problem, proximal, phi):
    norms = []
    for task, row in enumerate(phi):
        leaf = row.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(proximal_loss(problem, proximal, task, leaf), leaf)
        norms.append(gradient.norm())
    return torch.stack(norms)
