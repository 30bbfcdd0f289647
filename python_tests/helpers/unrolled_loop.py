"""Unrolled inner steps in plain PyTorch autograd, one task at a time: an oracle."""

from dataclasses import dataclass, field
from typing import Any

import torch
from bilevel import randn, tasks
from torch.utils import _pytree as pytree

from imaml_ext import TaskBatch

THETA = ("head", "bias")


def support_loss(params, data):
    """A head on a body; the loss has a learned weight and a learned weight decay."""
    x, y = data
    prediction = (x @ params["body"]).tanh() @ params["head"] + params["bias"]
    decay = params["log_decay"].exp() * params["head"].square().sum()
    return params["log_weight"].exp() * (prediction - y).square().mean() + decay


def query_loss(params, data):
    x, y = data
    prediction = (x @ params["body"]).tanh() @ params["head"] + params["bias"]
    return (prediction - y).square().mean()


def theta():
    return {"head": randn(3).requires_grad_(), "bias": randn(()).requires_grad_()}


def shared():
    return {
        "body": randn(2, 3).requires_grad_(),
        "log_weight": torch.tensor(0.3).double().requires_grad_(),
        "log_decay": torch.tensor(-2.0).double().requires_grad_(),
    }


def definite():
    """A dense lam that requires grad."""
    factor = randn(4, 4)
    return (factor @ factor.T / 4 + torch.eye(4).double()).requires_grad_()


def batch(count=3):
    return TaskBatch(*((randn(count, 6, 2), randn(count, 6)) for _ in range(2)))


def plain_direction(gradient, state, step):
    return gradient, state


def momentum_direction(gradient, state, step, momentum=0.7):
    state = gradient if step == 0 else momentum * state + gradient
    return state, state


def nesterov_direction(gradient, state, step, momentum=0.7):
    state = gradient if step == 0 else momentum * state + gradient
    return gradient + momentum * state, state


def adam_direction(gradient, state, step, beta1=0.9, beta2=0.999, eps=0.1):
    first, second = (0.0, 0.0) if step == 0 else state
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    root = (second / (1 - beta2 ** (step + 1))).sqrt()
    return first / (1 - beta1 ** (step + 1)) / (root + eps), (first, second)


@dataclass
class Loop:
    """The mean query loss after `steps` steps as a function of all learned tensors, by name."""

    steps: int = 3
    direction: Any = plain_direction
    lr: Any = field(default=lambda learned, step, name: 0.1)
    pull: Any = None  # (learned, displacement [D]) -> Λ displacement
    weights: Any = None  # of the query losses after each step
    last: Any = None
    first_order: bool = False

    def __call__(self, learned, batch, constants=None, graph=False):
        learned = (constants or {}) | learned
        pairs = zip(tasks(batch.support), tasks(batch.query), strict=True)
        losses = [self._of_task(learned, own, held_out, graph) for own, held_out in pairs]
        return torch.stack(losses).mean()

    def gradients(self, learned, batch):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in learned.items()}
        value = self(leaves, batch, graph=not self.first_order)
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def _of_task(self, learned, own, held_out, graph):
        phi = {name: learned[name] for name in THETA}
        last = self.steps if self.last is None else self.last
        states, total = dict.fromkeys(THETA, ()), 0.0
        for step in range(self.steps):
            if step == self.steps - last:
                phi = self._restarted(phi, learned)
                states = pytree.tree_map(lambda t: t if self.last is None else t.detach(), states)
            gradients = self._gradients(phi, learned, own, graph)
            for name, gradient in gradients.items():
                direction, states[name] = self.direction(gradient, states[name], step)
                phi[name] = phi[name] - self.lr(learned, step, name) * direction
            if self.weights is not None:
                total = total + self.weights[step] * query_loss(learned | phi, held_out)
        if last == 0:
            phi = self._restarted(phi, learned)
        return query_loss(learned | phi, held_out) if self.weights is None else total

    def _restarted(self, phi, learned):
        if self.last is None:
            return phi
        moved = {name: learned[name] - learned[name].detach() for name in THETA}
        return {
            name: phi[name].detach() + (moved[name] if self.pull is None else 0) for name in phi
        }

    def _gradients(self, phi, learned, own, graph):
        at = {
            n: t if t.requires_grad and graph else t.detach().requires_grad_()
            for n, t in phi.items()
        }
        value = support_loss(learned | at, own)
        found = torch.autograd.grad(value, list(at.values()), create_graph=graph)
        found = dict(zip(at, found, strict=True))
        if self.pull is None:
            return found
        away = torch.cat([(phi[name] - learned[name]).flatten() for name in THETA])
        head, bias = self.pull(learned, away).split([3, 1])
        return {"head": found["head"] + head, "bias": found["bias"] + bias[0]}
