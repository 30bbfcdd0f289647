"""Cases of dataset distillation: jaxopt's example, Wang et al. 2018, Nguyen et al. 2021 (KIP).

Re-created: learned images and learned labels, on which a logistic regression or a kernel machine is
fitted that must classify real examples; images of all tasks, and images that the tasks share.
Wang's fixed number of inner steps is unrolled there; here the fit is a minimum.
"""

import pytest
import torch
from bilevel import number, proximal, randn, same, value
from exact import EXACT, QUICK
from method_problems import derivative
from torch import nn
from torch.func import vmap

from imaml_ext import adapt

CLASSES, PIXELS, TASKS = 3, 4, 2
ZERO = {"w": torch.zeros(PIXELS, CLASSES, dtype=torch.float64)}
LABELS = torch.arange(CLASSES).repeat(2).expand(TASKS, 2 * CLASSES)


def cross_entropy(params, data):
    images, labels = data  # numbers of classes, or probabilities
    return nn.functional.cross_entropy(images @ params["w"], labels)


@pytest.fixture
def real():
    x = randn(TASKS, 60, PIXELS)
    return x, (x @ randn(TASKS, PIXELS, CLASSES)).argmax(-1)


def fitted(images, labels, real, lam=0.1, solvers=EXACT):
    phi = adapt(cross_entropy, ZERO, (images, labels), lam=lam, **solvers)
    return vmap(cross_entropy)(phi, real).mean()


def oracle(images, labels, real, lam=0.1):
    inner = proximal(cross_entropy, ZERO, lam)
    return value(inner, cross_entropy, ZERO, (images, labels), real)


def test_distilled_images_have_the_gradient_of_the_fit(real):
    images = randn(TASKS, 2 * CLASSES, PIXELS).requires_grad_()
    fitted(images, LABELS, real).backward()
    same([images.grad], torch.autograd.grad(oracle(images, LABELS, real), images))
    direction = torch.randn_like(images)  # the same by finite differences
    along = derivative(lambda at: oracle(at, LABELS, real).detach(), images.detach(), direction)
    same([(images.grad * direction).sum()], [along])


def test_distilled_soft_labels_and_the_strength_have_the_gradient_of_the_fit(real):
    images = randn(TASKS, 2 * CLASSES, PIXELS).requires_grad_()
    logits = randn(TASKS, 2 * CLASSES, CLASSES).requires_grad_()
    log_lam = number(-2.0)
    learned = [images, logits, log_lam]
    want = torch.autograd.grad(oracle(images, logits.softmax(-1), real, log_lam.exp()), learned)
    fitted(images, logits.softmax(-1), real, log_lam.exp()).backward()
    same([t.grad for t in learned], want)


def test_images_that_the_tasks_share_have_the_sum_of_their_gradients(real):
    images = randn(2 * CLASSES, PIXELS).requires_grad_()
    fitted(images.expand(TASKS, -1, -1), LABELS, real).backward()
    each = images.detach().repeat(TASKS, 1, 1).requires_grad_()
    (want,) = torch.autograd.grad(oracle(each, LABELS, real), each)
    same([images.grad], [want.sum(0)])


def test_images_of_a_generator_give_it_the_gradient_of_the_fit(real):
    generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, PIXELS)).double()
    codes, parameters = randn(TASKS, 2 * CLASSES, 3), list(generator.parameters())
    want = torch.autograd.grad(oracle(generator(codes), LABELS, real), parameters)
    fitted(generator(codes), LABELS, real).backward()
    same([p.grad for p in parameters], want)


def gaussian(x, z):
    return (-0.5 * (x[..., :, None, :] - z[..., None, :, :]).square().sum(-1)).exp()


def test_distilled_inducing_points_have_the_gradient_of_kernel_regression(real):
    # KIP: the dual of kernel ridge regression, without a proximal term; in closed form.
    x, labels = real
    targets = nn.functional.one_hot(labels, CLASSES).double()
    points = randn(TASKS, 6, PIXELS).requires_grad_()
    values = randn(TASKS, 6, CLASSES).requires_grad_()
    start = {"alpha": torch.zeros(6, CLASSES, dtype=torch.float64)}

    def dual(params, data):
        points, values = data
        alpha, matrix = params["alpha"], gaussian(points, points) + 0.1 * torch.eye(6).double()
        return (0.5 * alpha * (matrix @ alpha) - values * alpha).sum()

    def loss_of(alpha):
        return (gaussian(x, points) @ alpha - targets).square().mean()

    matrix = gaussian(points, points) + 0.1 * torch.eye(6, dtype=torch.float64)
    want = torch.autograd.grad(loss_of(torch.linalg.solve(matrix, values)), [points, values])
    loss_of(adapt(dual, start, (points, values), lam=0.0, **EXACT)["alpha"]).backward()
    same([points.grad, values.grad], want)


def test_one_distilled_image_for_each_class_teaches_what_the_real_examples_do(real):
    images = randn(TASKS, CLASSES, PIXELS).requires_grad_()
    labels = torch.arange(CLASSES).expand(TASKS, CLASSES)
    optimizer = torch.optim.Adam([images], lr=0.5)
    first = fitted(images, labels, real).item()
    for _ in range(20):
        optimizer.zero_grad()
        fitted(images, labels, real, solvers=QUICK).backward()
        optimizer.step()
    phi = adapt(cross_entropy, ZERO, (images.detach(), labels), lam=0.1, **EXACT)
    assert vmap(cross_entropy)(phi, real).mean() < 0.5 * first
    assert ((real[0] @ phi["w"]).argmax(-1) == real[1]).double().mean() > 0.8
