"""Experiments as data: what to train on, how to adapt, how to differentiate, how to step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from imaml_ext.cg import ConjugateGradient
from imaml_ext.data import ImageEpisodes, Sinusoid, load_omniglot
from imaml_ext.inner import LBFGS, Adam, GradientDescent, HessianFree, InnerSolver
from imaml_ext.linear import LinearSolver
from imaml_ext.maml import FOMAML, MAML, Reptile, TruncatedMAML
from imaml_ext.methods import IMAML, Method
from imaml_ext.minres import MINRES
from imaml_ext.models import conv4, mlp
from imaml_ext.neumann import NeumannSeries
from imaml_ext.objective import ModuleLoss, module_loss
from imaml_ext.solution import CurvatureKind
from imaml_ext.strength import Form, ProximalStrength
from imaml_ext.tasks import TaskSource
from imaml_ext.trainer import Metric, Trainer, accuracy


@dataclass(frozen=True)
class Config:
    """One experiment. The command line has a flag for each field."""

    dataset: str
    method: str = "imaml"
    way: int = 5
    shot: int = 1
    query: int = 1
    eval_query: int = 1
    tasks: int = 16
    lam: float = 2.0
    inner_lr: float = 0.1
    inner_steps: int = 16
    cg_steps: int = 5
    damping: float = 0.0
    curvature: CurvatureKind = "hessian"
    inner: str = "gd"
    linear: str = "cg"
    last: int = 5
    learn_lam: str = "no"
    learn_lr: bool = False
    meta_lr: float = 1e-3
    meta_steps: int = 1000
    seed: int = 0


PRESETS = {
    "sinusoid": Config(
        dataset="sinusoid",
        way=1,
        shot=10,
        query=10,
        eval_query=100,
        tasks=25,
        lam=0.1,
        inner_lr=0.01,
        inner_steps=10,
        curvature="ggn",
        meta_steps=3000,
    ),
    "omniglot": Config(
        dataset="omniglot",
        query=5,
        lam=0.3,
        inner_steps=8,
        cg_steps=3,
        meta_lr=2e-3,
        meta_steps=1500,
    ),
}


CHOICES = {
    "method": ["imaml", "maml", "maml-accelerated", "truncated-maml", "fomaml", "reptile"],
    "inner": ["gd", "nesterov", "adam", "hessian-free", "lbfgs"],
    "linear": ["cg", "cg-jacobi", "minres", "neumann"],
    "curvature": ["hessian", "ggn"],
    "learn_lam": ["no", "scalar", "tensor", "diagonal"],
}

_EVALUATED_AT_ONCE = 20  # not config.tasks: the evaluation tasks must not depend on it


@dataclass(frozen=True)
class Experiment:
    """A config brought to life."""

    config: Config
    loss: ModuleLoss
    method: Method
    sources: dict[str, TaskSource]  # train, val, test: of disjoint classes, where there are classes
    metrics: dict[str, Metric]

    def trainer(self) -> Trainer:
        """Adam, its rate constant for half of the meta-steps and then falling linearly to 2%."""
        config = self.config
        optimizer = torch.optim.Adam(self.method.learned().values(), lr=config.meta_lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, max(0.02, 2 - 2 * step / config.meta_steps))
        )
        watched = {name: metric for name, metric in self.metrics.items() if name != "loss"}
        return Trainer(
            self.method, self.sources["train"], optimizer, scheduler=scheduler, metrics=watched
        )


def build(
    config: Config,
    *,
    data: str | Path = "data",
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Experiment:
    """Model, method and task sources of a config. The model's start depends on the seed alone.

    Raises:
        FileNotFoundError, ValueError: the data is not there or not usable, or a setting is wrong.
    """
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {getattr(config, name)!r}")
    if config.meta_steps < 1:
        raise ValueError(f"meta_steps must be at least 1, got {config.meta_steps}")
    if config.dataset not in PRESETS:
        raise ValueError(f"dataset must be one of {list(PRESETS)}, got {config.dataset!r}")
    sources: dict[str, TaskSource]
    if config.dataset == "sinusoid":
        loss = module_loss(_seeded(config, lambda: mlp(1, 40, 40, 1)), nn.functional.mse_loss)
        metrics: dict[str, Metric] = {"loss": loss}
        sources = {
            name: Sinusoid(
                shot=config.shot,
                query=config.query if name == "train" else config.eval_query,
                tasks=config.tasks if name == "train" else _EVALUATED_AT_ONCE,
                seed=_seed(config, name),
                device=device,
            )
            for name in ("train", "val", "test")
        }
    else:
        loss = module_loss(_seeded(config, lambda: conv4(config.way)), nn.functional.cross_entropy)
        metrics = {"accuracy": accuracy(loss.outputs), "loss": loss}
        images = load_omniglot(data, download=download).to(device).split()
        sources = {
            name: ImageEpisodes(
                images[name],
                way=config.way,
                shot=config.shot,
                query=config.query if name == "train" else config.eval_query,
                tasks=config.tasks if name == "train" else _EVALUATED_AT_ONCE,
                seed=_seed(config, name),
                rotate=name == "train",
            )
            for name in ("train", "val", "test")
        }
    loss.model.to(device)
    return Experiment(config, loss, _method(config, loss), sources, metrics)


def _method(config: Config, loss: ModuleLoss) -> Method:
    params = dict(loss.model.named_parameters())
    if config.method == "imaml":
        if config.learn_lr:
            raise ValueError(
                "learn_lr is for MAML: the implicit gradient does not see the step size"
            )
        lam: float | ProximalStrength = config.lam
        if config.learn_lam != "no":
            lam = ProximalStrength(params, config.lam, form=cast(Form, config.learn_lam))
        return IMAML(loss, params, lam=lam, inner=_inner(config), cg=_linear(config))
    if config.learn_lam != "no":
        raise ValueError(f"learn_lam is for imaml, got method {config.method!r}")
    if config.inner != "gd":
        raise ValueError(f"inner is for imaml, got method {config.method!r} and {config.inner!r}")
    descent = GradientDescent(lr=config.inner_lr, steps=config.inner_steps)
    if config.method in ("fomaml", "reptile"):
        if config.learn_lr:
            raise ValueError(f"learn_lr needs a second-order method, got {config.method!r}")
        return (FOMAML if config.method == "fomaml" else Reptile)(loss, params, inner=descent)
    if config.method == "truncated-maml":
        return TruncatedMAML(
            loss, params, last=config.last, inner=descent, learn_lr=config.learn_lr
        )
    if config.method == "maml-accelerated":
        return MAML(
            loss, params, inner=descent, lam=config.lam, accelerated=True, learn_lr=config.learn_lr
        )
    return MAML(loss, params, inner=descent, learn_lr=config.learn_lr)


def _inner(config: Config) -> InnerSolver:
    lr, steps = config.inner_lr, config.inner_steps
    if config.inner == "nesterov":
        return GradientDescent.accelerated(lr=lr, steps=steps, strong_convexity=config.lam)
    if config.inner == "adam":
        return Adam(lr=lr, steps=steps)
    if config.inner == "hessian-free":
        return HessianFree(steps=steps)
    if config.inner == "lbfgs":
        return LBFGS(steps=steps)
    return GradientDescent(lr=lr, steps=steps)


def _linear(config: Config) -> LinearSolver:
    max_iter, damping, curvature = config.cg_steps, config.damping, config.curvature
    if config.linear == "minres":
        return MINRES(max_iter=max_iter, damping=damping, curvature=curvature)
    if config.linear == "neumann":
        return NeumannSeries(
            max_iter=max_iter, damping=damping, curvature=curvature, lr=config.inner_lr
        )
    return ConjugateGradient(
        max_iter=max_iter,
        damping=damping,
        curvature=curvature,
        preconditioner="jacobi" if config.linear == "cg-jacobi" else None,
    )


def _seeded(config: Config, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make()


def _seed(config: Config, source: str) -> int:
    """Evaluation tasks are the same for every training seed."""
    return config.seed if source == "train" else {"val": 101, "test": 102}[source]
