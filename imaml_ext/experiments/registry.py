"""What the names in a `Config` refer to: data sets, methods and solvers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from imaml_ext.data import load_mini_imagenet, load_omniglot, load_tiny_imagenet
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.experiments.config import Config, Decay, LearnLam
from imaml_ext.experiments.models import conv4, mlp
from imaml_ext.methods.base import Method
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.maml import FOMAML, MAML, Reptile, TruncatedMAML
from imaml_ext.methods.meta_gradient import Nonfinite
from imaml_ext.problem.lam import ProximalStrength
from imaml_ext.problem.module_loss import ModuleLoss
from imaml_ext.problem.objective import CurvatureKind
from imaml_ext.solvers.inner import LBFGS, Adam, GradientDescent, HessianFree, InnerSolver
from imaml_ext.solvers.linear.base import LinearSolver
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.linear.minres import MINRES
from imaml_ext.solvers.linear.neumann import NeumannSeries

Images = dict[str, Tensor]  # uint8 [classes, images, ...] of train, val and test


@dataclass(frozen=True)
class Dataset:
    """A data set, and the network for it.

    Args:
        network: builds the network for a number of classes.
        images: loads the images under a root folder, and may download them; None: sinusoids.
        eval_tasks_at_once: tasks per batch in evaluation, as many as memory allows.
        rotate: whether images rotated by 90, 180 and 270 degrees are training classes too.
    """

    network: Callable[[int], nn.Module]
    images: Callable[[str | Path, bool], Images] | None = None
    eval_tasks_at_once: int = 20
    rotate: bool = False


def _omniglot(root: str | Path, download: bool) -> Images:
    return load_omniglot(root, download=download).split()


def _local(load: Callable[[str | Path], Images]) -> Callable[[str | Path, bool], Images]:
    def images(root: str | Path, download: bool) -> Images:
        if download:
            raise ValueError("--download is for omniglot: the others have no public archive")
        return load(root)

    return images


_natural = partial(conv4, channels=3, filters=32, pool=True)

DATASETS = {
    "sinusoid": Dataset(lambda way: mlp(1, 40, 40, 1)),
    "omniglot": Dataset(conv4, _omniglot, rotate=True),
    "mini-imagenet": Dataset(
        partial(_natural, image=84), _local(load_mini_imagenet), eval_tasks_at_once=4
    ),
    "tiny-imagenet": Dataset(partial(_natural, image=32), _local(load_tiny_imagenet)),
}

INNER: dict[str, Callable[[Config], InnerSolver]] = {
    "gd": lambda c: GradientDescent(lr=c.inner_lr, steps=c.inner_steps),
    "gd-then-proximal": lambda c: DescentThenProximal(lr=c.inner_lr, steps=c.inner_steps),
    "nesterov": lambda c: GradientDescent.accelerated(
        lr=c.inner_lr, steps=c.inner_steps, strong_convexity=c.lam
    ),
    "adam": lambda c: Adam(lr=c.inner_lr, steps=c.inner_steps),
    "hessian-free": lambda c: HessianFree(steps=c.inner_steps),
    "lbfgs": lambda c: LBFGS(steps=c.inner_steps),
}


def _linear(c: Config) -> dict[str, Any]:
    return {"max_iter": c.cg_steps, "damping": c.damping, "curvature": c.curvature}


LINEAR: dict[str, Callable[[Config], LinearSolver]] = {
    "cg": lambda c: ConjugateGradient(**_linear(c)),
    "cg-authors-code": lambda c: AuthorsCodeCG(**_linear(c)),
    "cg-jacobi": lambda c: ConjugateGradient(**_linear(c), preconditioner="jacobi"),
    "minres": lambda c: MINRES(**_linear(c)),
    "neumann": lambda c: NeumannSeries(**_linear(c), lr=c.inner_lr),
}


def _implicit(config: Config, loss: ModuleLoss) -> Method:
    if config.learn_lr:
        raise ValueError(
            "learn_lr is for maml: the implicit gradient does not depend on the step size"
        )
    params = dict(loss.model.named_parameters())
    lam: float | ProximalStrength = config.lam
    if config.learn_lam != "no":
        lam = ProximalStrength(params, config.lam, form=config.learn_lam)
    return IMAML(
        loss,
        params,
        lam=lam,
        inner=INNER[config.inner](config),
        linear=LINEAR[config.linear](config),
        adapt_proximal=config.eval_proximal,
        nonfinite=config.nonfinite,
    )


def _by_descent(
    config: Config, loss: ModuleLoss, method: Callable[..., Method], **settings: Any
) -> Method:
    """A method whose inner solver is gradient descent."""
    if config.learn_lam != "no":
        raise ValueError(f"learn_lam is for imaml, got method {config.method!r}")
    if config.inner != "gd":
        raise ValueError(f"inner is for imaml, got method {config.method!r} and {config.inner!r}")
    params = dict(loss.model.named_parameters())
    inner = INNER["gd"](config)
    return method(loss, params, inner=inner, nonfinite=config.nonfinite, **settings)


def _first_order(config: Config, loss: ModuleLoss, method: Callable[..., Method]) -> Method:
    if config.learn_lr:
        raise ValueError(f"learn_lr needs a second-order method, got {config.method!r}")
    return _by_descent(config, loss, method)


METHODS: dict[str, Callable[[Config, ModuleLoss], Method]] = {
    "imaml": _implicit,
    "maml": lambda c, loss: _by_descent(c, loss, MAML, learn_lr=c.learn_lr),
    "maml-accelerated": lambda c, loss: _by_descent(
        c, loss, MAML, learn_lr=c.learn_lr, lam=c.lam, accelerated=True
    ),
    "truncated-maml": lambda c, loss: _by_descent(
        c, loss, TruncatedMAML, learn_lr=c.learn_lr, last=c.last
    ),
    "fomaml": lambda c, loss: _first_order(c, loss, FOMAML),
    "reptile": lambda c, loss: _first_order(c, loss, Reptile),
}


CHOICES = {  # by field of Config
    "dataset": list(DATASETS),
    "method": list(METHODS),
    "inner": list(INNER),
    "linear": list(LINEAR),
    "curvature": list(get_args(CurvatureKind)),
    "learn_lam": list(get_args(LearnLam)),
    "nonfinite": list(get_args(Nonfinite)),
    "decay": list(get_args(Decay)),
}
