"""Cases of jaxopt: implicit_diff_test, lbfgs_test, scipy_wrappers_test, block_cd_test, objective.

Re-created: Jacobians of ridge regression by the regularisation, the inputs and the targets;
hyper-gradients of binary and multinomial logistic regression, of linear SVMs with squared hinge
loss, of a kernel machine in the dual, and of an elastic net with a smooth absolute value; a solver
of SciPy. jaxopt's non-smooth proximal operators and projections have no counterpart here.
"""

import pytest
import torch
from bilevel import minimum, number, proximal, randn, same, tasks, value
from exact import CG, EXACT
from method_problems import derivative
from scipy.optimize import minimize
from torch import nn

from imaml_ext import External, adapt, implicit_meta_grad

ZERO = {"w": torch.zeros(4, dtype=torch.float64)}


def squares(params, data):
    x, y = data
    return 0.5 * (x @ params["w"] - y).square().mean()


def regression(count=3, examples=12):
    x, noise = randn(count, examples, 4), 0.3 * randn(count, examples)
    return x, (x @ randn(count, 4, 1))[..., 0] + noise


def ridge(x, y, strength):
    """The minimum of `squares + strength/2 |w|^2` for every task, [B, D]."""
    gram = x.mT @ x / y.shape[-1] + strength * torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.linalg.solve(gram, (x.mT @ y[..., None] / y.shape[-1]))[..., 0]


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_jacobian_of_ridge_weights_by_their_regularisation_is_the_closed_form(vectorize):
    x, y = regression()
    strength = torch.tensor(0.5, dtype=torch.float64)

    def solver(strength):
        return adapt(squares, ZERO, (x, y), lam=strength, **EXACT)["w"]

    got = torch.autograd.functional.jacobian(solver, strength, vectorize=vectorize)
    gram = x.mT @ x / 12 + strength * torch.eye(4, dtype=torch.float64)
    want = -torch.linalg.solve(gram, ridge(x, y, strength)[..., None])[..., 0]
    same([got], [want])


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_jacobian_of_ridge_weights_by_inputs_and_targets_is_the_closed_form(vectorize):
    data = regression(count=2, examples=6)

    def solver(x, y):
        return adapt(squares, ZERO, (x, y), lam=0.5, **EXACT)["w"]

    got = torch.autograd.functional.jacobian(solver, data, vectorize=vectorize)
    want = torch.autograd.functional.jacobian(lambda x, y: ridge(x, y, 0.5), data)
    same(got, want)
    assert not got[0][0, :, 1].any()  # a task does not depend on the data of another


def test_a_regularisation_in_the_loss_has_the_hyper_gradient_of_the_proximal_term():
    support, query = regression(), regression()

    def decayed(params, data):
        return squares(params, data) + 0.5 * params["log decay"].exp() * params["w"].square().sum()

    def gradient(log_decay):
        return implicit_meta_grad(
            decayed, ZERO, support, query, lam=0.0, shared={"log decay": log_decay},
            query_loss=squares, **EXACT,
        )  # fmt: skip

    log_decay = number(-1.0)
    out = gradient(log_decay)
    weights = ridge(*support, log_decay.exp())
    total = torch.stack(
        [squares({"w": w}, q) for w, q in zip(weights, tasks(query), strict=True)]
    ).mean()
    (want,) = torch.autograd.grad(total, log_decay)
    same([out.shared["log decay"]], [want])
    assert not out.params["w"].any()  # without a proximal term, the start does not matter
    proximal_form = implicit_meta_grad(
        squares, ZERO, support, query, lam=log_decay.detach().exp(), **EXACT
    )
    same([proximal_form.lam * log_decay.exp()], [want])


def test_the_start_has_no_gradient_without_a_proximal_term():
    support, query = regression(), regression()
    start = {"w": randn(4).requires_grad_()}
    phi = adapt(squares, start, support, lam=0.0, **EXACT)
    torch.func.vmap(squares)(phi, query).mean().backward()
    assert torch.equal(start["w"].grad, torch.zeros(4, dtype=torch.float64))
    same([phi["w"]], [ridge(*support, 0.0)])


def binary(count=3, examples=20):
    x = randn(count, examples, 4)
    return x, ((x @ randn(count, 4, 1))[..., 0] + 0.5 * randn(count, examples) > 0).double()


def logistic(params, data):
    x, y = data
    return nn.functional.binary_cross_entropy_with_logits(x @ params["w"], y)


def decayed_logistic(params, data):
    return logistic(params, data) + 0.5 * params["log decay"].exp() * params["w"].square().sum()


@pytest.mark.parametrize("method", ["implicit_meta_grad", "adapt"])
def test_the_hyper_gradient_of_binary_logistic_regression_is_that_of_its_minimum(method):
    support, query, log_decay = binary(), binary(), number(-2.0)

    def bilevel(log_decay):
        def inner(phi, data):
            return decayed_logistic(phi | {"log decay": log_decay}, data)

        return value(inner, logistic, ZERO, support, query)

    (want,) = torch.autograd.grad(bilevel(log_decay), log_decay)
    same([derivative(bilevel, log_decay.detach(), 1.0)], [want])  # the oracle is right
    settings = {"lam": 0.0, "shared": {"log decay": log_decay}, **EXACT}
    if method == "adapt":
        phi = adapt(decayed_logistic, ZERO, support, **settings)
        torch.func.vmap(logistic)(phi, query).mean().backward()
        got = log_decay.grad
    else:
        out = implicit_meta_grad(
            decayed_logistic, ZERO, support, query, query_loss=logistic, **settings
        )
        got = out.shared["log decay"]
    same([got], [want])


def multinomial(params, data):
    x, y = data
    return nn.functional.cross_entropy(x @ params["w"] + params["b"], y)


def labelled(count=3, examples=18):
    return randn(count, examples, 4), torch.randint(3, (count, examples))


def test_multinomial_logistic_regression_has_a_hyper_gradient_for_each_parameter():
    # A decay of the intercepts too: without one, adding a number to all of them changes nothing.
    support, query = labelled(), labelled()
    start = {"w": torch.zeros(4, 3).double(), "b": torch.zeros(3).double()}
    decay = {"w": (0.1 + torch.rand(4, 3).double()).requires_grad_(), "b": number(0.7)}
    want = torch.autograd.grad(
        value(proximal(multinomial, start, decay), multinomial, start, support, query),
        list(decay.values()),
    )
    phi = adapt(multinomial, start, support, lam=decay, **EXACT)
    torch.func.vmap(multinomial)(phi, query).mean().backward()
    same([strength.grad for strength in decay.values()], want)


def hinge(params, data):
    """A linear SVM in the primal, with squared hinge loss (L2-SVM)."""
    x, y = data
    margins = (1 - y * (x @ params["w"])).clamp_min(0)
    return params["log c"].exp() * margins.square().sum() + 0.5 * params["w"].square().sum()


def support_vectors(x, y, c, phi):
    """The minimum of `hinge`, in closed form, given which examples are support vectors at phi."""
    active = x[y * (x @ phi) < 1]
    targets = y[y * (x @ phi) < 1]
    matrix = torch.eye(4, dtype=torch.float64) + 2 * c * active.T @ active
    return torch.linalg.solve(matrix, 2 * c * active.T @ targets)


@pytest.mark.parametrize("regularised", ["in the loss", "by the proximal term"])
def test_the_hyper_gradient_of_an_svm_is_that_of_its_support_vectors(regularised):
    x, y = binary()
    support, query, log_c = (x, 2 * y - 1), binary(), number(-0.5)
    within = regularised == "in the loss"

    def loss(params, data):
        return hinge(params, data) - (0 if within else 0.5 * params["w"].square().sum())

    out = implicit_meta_grad(
        loss, ZERO, support, query, lam=0.0 if within else 1.0, shared={"log c": log_c},
        query_loss=logistic, **EXACT,
    )  # fmt: skip
    losses = []
    for (xs, ys), held_out, phi in zip(tasks(support), tasks(query), out.adapted["w"], strict=True):
        w = support_vectors(xs, ys, log_c.exp(), phi)
        torch.testing.assert_close(phi, w.detach(), rtol=1e-9, atol=1e-11)
        active = ys * (xs @ phi) < 1
        assert 2 < active.sum() < len(active)  # both kinds of examples
        losses.append(logistic({"w": w}, held_out))
    (want,) = torch.autograd.grad(torch.stack(losses).mean(), log_c)
    same([out.shared["log c"]], [want])


def gaussian(x, z, width):
    return (-(x[..., :, None, :] - z[..., None, :, :]).square().sum(-1) / (2 * width**2)).exp()


def test_the_dual_of_kernel_ridge_regression_has_hyper_gradients_of_width_and_strength():
    (x, y), (xq, yq) = regression(), regression()
    start = {"alpha": torch.zeros(12, dtype=torch.float64)}
    width, strength = number(1.5), number(0.2)

    def dual(params, data):
        x, y = data
        alpha = params["alpha"]
        matrix = gaussian(x, x, params["width"]) + params["strength"] * torch.eye(12).double()
        return 0.5 * alpha @ matrix @ alpha - y @ alpha

    def predicted(params, data):
        x, xq, yq = data
        return (gaussian(xq, x, params["width"]) @ params["alpha"] - yq).square().mean()

    out = implicit_meta_grad(
        dual, start, (x, y), (x, xq, yq), lam=0.0, query_loss=predicted,
        shared={"width": width, "strength": strength}, **EXACT,
    )  # fmt: skip
    matrix = gaussian(x, x, width) + strength * torch.eye(12, dtype=torch.float64)
    alpha = torch.linalg.solve(matrix, y[..., None])
    total = ((gaussian(xq, x, width) @ alpha)[..., 0] - yq).square().mean()
    same(out.shared.values(), torch.autograd.grad(total, [width, strength]))


def test_an_elastic_net_with_a_smooth_absolute_value_has_the_hyper_gradients_of_its_minimum():
    support, query = regression(), regression()
    hyper = {"log l1": number(-2.0), "log l2": number(-3.0)}

    def elastic(params, data):
        w = params["w"]
        smooth = (w.square() + 1e-2).sqrt().sum()
        penalty = params["log l1"].exp() * smooth + params["log l2"].exp() * w.square().sum()
        return squares(params, data) + penalty

    def bilevel(log_l1, log_l2):
        def inner(phi, data):
            return elastic(phi | {"log l1": log_l1, "log l2": log_l2}, data)

        return value(inner, squares, ZERO, support, query)

    want = torch.autograd.grad(bilevel(*hyper.values()), list(hyper.values()))
    out = implicit_meta_grad(
        elastic, ZERO, support, query, lam=0.0, shared=hyper, query_loss=squares, **EXACT
    )
    same(out.shared.values(), want)


def test_a_solver_of_scipy_is_differentiated_like_our_own():
    support, query = binary(), binary()
    log_decay = number(-2.0)

    def scipy_bfgs(problem):
        found = []
        for one in problem.one_by_one():

            def both(array, one=one):
                objective, gradient = one.value_and_gradient(torch.from_numpy(array)[None])
                return objective.item(), gradient[0].numpy()

            found.append(minimize(both, one.theta.numpy(), jac=True, method="BFGS", tol=1e-10).x)
        return torch.stack([torch.from_numpy(x) for x in found])

    phi = adapt(
        decayed_logistic, ZERO, support, lam=0.0, shared={"log decay": log_decay},
        inner=External(scipy_bfgs), linear=CG,
    )  # fmt: skip
    torch.func.vmap(logistic)(phi, query).mean().backward()

    def inner(phi, data):
        return decayed_logistic(phi | {"log decay": log_decay}, data)

    want = torch.autograd.grad(value(inner, logistic, ZERO, support, query), log_decay)
    same([log_decay.grad], want, rtol=1e-7)  # BFGS stops at a gradient of 1e-10


def test_a_regularisation_that_the_loss_closes_over_is_refused_by_name():
    # jaxopt's issue 111: the gradient of such a number would be lost.
    decay = number(0.3)

    def closed_over(params, data):
        return squares(params, data) + decay * params["w"].square().sum()

    with pytest.raises(ValueError, match="shared="):
        adapt(closed_over, ZERO, regression(), lam=0.1, **EXACT)


def test_the_minimum_itself_is_that_of_the_oracle():
    support = binary()
    phi = adapt(logistic, ZERO, support, lam=0.2, **EXACT)
    inner = proximal(logistic, ZERO, 0.2)
    for own, row in zip(tasks(support), phi["w"], strict=True):
        same([row], [minimum(lambda phi, own=own: inner(phi, own), ZERO)["w"]])
