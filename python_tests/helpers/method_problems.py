"""A problem with its parameters and batch, and finite differences of objectives."""

from problems import regression

from imaml_ext import GradientDescent, TaskBatch

INNER = GradientDescent(lr=0.05, steps=5)


def setting(device, tasks=3):
    problem = regression(tasks, device)
    params = {name: t.clone().requires_grad_() for name, t in problem.params.items()}
    return problem, params, TaskBatch(problem.support, problem.query)


def query_loss(problem, task, phi):
    return problem.flat_loss(phi, tuple(t[task] for t in problem.query))


def derivative(function, at, direction):
    """Of `function` along `direction`, by Richardson extrapolation: to order h^4."""

    def central(h):
        return (function(at + h * direction) - function(at - h * direction)) / (2 * h)

    return (4 * central(1e-3) - central(2e-3)) / 3
