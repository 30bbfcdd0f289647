"""What the names in a `Config` refer to: data sets, methods and solvers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from imaml_ext._checks import check_range
from imaml_ext.data import load_mini_imagenet, load_omniglot, load_tiny_imagenet
from imaml_ext.data.missing import MissingDataError
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.experiments.config import Config, Decay, LearnLam, Network
from imaml_ext.experiments.models import conv4, mlp, wide_conv4
from imaml_ext.experiments.query_loss import QueryLoss
from imaml_ext.experiments.ridge_head import RidgeHead
from imaml_ext.methods.base import Method
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.maml import FOMAML, MAML, TruncatedMAML
from imaml_ext.methods.meta_gradient import Nonfinite
from imaml_ext.methods.reptile import Reptile
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
    """A data set, and the networks for it.

    Args:
        networks: by name, what builds the network for a number of classes.
        images: loads the images under a root folder, and may download them; None: sinusoids.
        eval_tasks_at_once: tasks per batch in evaluation, as many as memory allows.
        rotate: whether images rotated by 90, 180 and 270 degrees are training classes too.
    """

    networks: Mapping[Network, Callable[[int], nn.Module]]
    images: Callable[[str | Path, bool], Images] | None = None
    eval_tasks_at_once: int = 20
    rotate: bool = False


@contextmanager
def _advice(remedy: str) -> Iterator[None]:
    """Context in which the error for missing data has a remedy for the command line."""
    try:
        yield
    except MissingDataError as error:
        raise FileNotFoundError(f"{error.expected}; {remedy}") from error


def omniglot_images(root: str | Path, download: bool = False) -> Images:
    with _advice(
        "give the folder that contains omniglot-py with --data, or download it with "
        "imaml-ext train omniglot --download"
    ):
        return load_omniglot(root, download=download).split()


def _local(
    load: Callable[[str | Path], Images], remedy: str
) -> Callable[[str | Path, bool], Images]:
    def images(root: str | Path, download: bool) -> Images:
        if download:
            raise ValueError("--download is for omniglot: the others have no public archive")
        with _advice(remedy):
            return load(root)

    return images


def _natural(image: int) -> dict[Network, Callable[[int], nn.Module]]:
    return {
        "paper": partial(conv4, channels=3, image=image, filters=32, pool=True),
        "wide": partial(wide_conv4, channels=3, image=image),
    }


DATASETS = {
    "sinusoid": Dataset({"paper": lambda way: mlp(1, 40, 40, 1)}),
    "omniglot": Dataset({"paper": conv4, "wide": wide_conv4}, omniglot_images, rotate=True),
    "mini-imagenet": Dataset(
        _natural(84),
        _local(load_mini_imagenet, "give the folder of your ImageNet images with --data"),
        eval_tasks_at_once=4,
    ),
    "tiny-imagenet": Dataset(
        _natural(32), _local(load_tiny_imagenet, "give its folder with --data")
    ),
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


def _imaml(c: Config, *, params: dict[str, nn.Parameter], **shared: Any) -> IMAML:
    lam: float | ProximalStrength = c.lam
    if c.learn_lam != "no":
        lam = ProximalStrength(params, c.lam, form=c.learn_lam)
    linear = LINEAR[c.linear](c)
    return IMAML(params=params, lam=lam, linear=linear, adapt_proximal=c.eval_proximal, **shared)


def _ridge_head(c: Config, *, loss: ModuleLoss, **_: Any) -> RidgeHead:
    if loss.criterion is not nn.functional.cross_entropy:
        raise ValueError("ridge-head is for classification")
    if c.nonfinite == "omit":
        raise ValueError("ridge-head cannot omit tasks: their gradients are computed together")
    return RidgeHead(loss, shot=c.shot)


METHODS: dict[str, Callable[..., Method]] = {
    "imaml": _imaml,
    "maml": lambda c, **shared: MAML(learn_lr=c.learn_lr, **shared),
    "maml-accelerated": lambda c, **shared: MAML(
        learn_lr=c.learn_lr, lam=c.lam, accelerated=True, **shared
    ),
    "truncated-maml": lambda c, **shared: TruncatedMAML(learn_lr=c.learn_lr, last=c.last, **shared),
    "fomaml": lambda _, **shared: FOMAML(**shared),
    "reptile": lambda _, **shared: Reptile(**shared),
    "ridge-head": _ridge_head,
}

_WITH_QUERY_LOSS = ("imaml", "maml", "maml-accelerated", "truncated-maml", "fomaml")
_ONLY_FOR = {  # the methods that use a field of Config; of others it must have its default
    # The implicit gradient does not depend on the step size.
    "learn_lr": ("maml", "maml-accelerated", "truncated-maml"),
    "learn_lam": ("imaml",),
    "inner": ("imaml",),
    "query_batches": _WITH_QUERY_LOSS,
    "query_scale": _WITH_QUERY_LOSS,
    "train_way": ("ridge-head",),  # the others learn a head for a number of classes
    "network": ("ridge-head",),  # running statistics change in training
}


def make_method(config: Config, loss: ModuleLoss) -> Method:
    """The method of a config.

    Raises:
        ValueError: a setting is invalid, or does not apply to the method.
    """
    for name, methods in _ONLY_FOR.items():
        value = getattr(config, name)
        if value != getattr(Config, name) and config.method not in methods:
            raise ValueError(
                f"{name} is for {', '.join(methods)}, got {value!r} with method {config.method!r}"
            )
    check_range("query_scale", config.query_scale, "(0, inf)")
    if config.query_batches < 1 or config.query % config.query_batches:
        raise ValueError(
            f"query_batches must divide query={config.query}, got {config.query_batches}"
        )
    more: dict[str, Any] = {}
    if (config.query_batches, config.query_scale) != (1, 1.0):  # Reptile has no query loss
        more["query_loss"] = QueryLoss(loss, config.query_batches, config.query_scale)
    return METHODS[config.method](
        config,
        loss=loss,
        params=dict(loss.model.named_parameters()),
        inner=INNER[config.inner](config),
        nonfinite=config.nonfinite,
        **more,
    )


CHOICES = {  # by field of Config
    "dataset": list(DATASETS),
    "method": list(METHODS),
    "inner": list(INNER),
    "linear": list(LINEAR),
    "network": list(get_args(Network)),
    "curvature": list(get_args(CurvatureKind)),
    "learn_lam": list(get_args(LearnLam)),
    "nonfinite": list(get_args(Nonfinite)),
    "decay": list(get_args(Decay)),
}
