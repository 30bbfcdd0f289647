"""A config brought to life: data, model, method, and their trainer."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from imaml_ext.data import (
    ImageEpisodes,
    Sinusoid,
    load_mini_imagenet,
    load_omniglot,
    load_tiny_imagenet,
)
from imaml_ext.data.tasks import TaskSource
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.experiments.config import CHOICES, Config
from imaml_ext.experiments.models import conv4, mlp
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.methods.base import Method
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.maml import FOMAML, MAML, Reptile, TruncatedMAML
from imaml_ext.methods.meta_gradient import Nonfinite
from imaml_ext.problem.lam import Form, ProximalStrength
from imaml_ext.problem.module_loss import ModuleLoss, module_loss
from imaml_ext.solvers.inner import LBFGS, Adam, GradientDescent, HessianFree, InnerSolver
from imaml_ext.solvers.linear.base import LinearSolver
from imaml_ext.solvers.linear.cg import ConjugateGradient
from imaml_ext.solvers.linear.minres import MINRES
from imaml_ext.solvers.linear.neumann import NeumannSeries
from imaml_ext.training.distributed import Group, shard
from imaml_ext.training.evaluation import Metric, SupportMetric, accuracy, support_accuracy
from imaml_ext.training.recorded import RecordedMetaGradient
from imaml_ext.training.support_statistics import SupportStatistics
from imaml_ext.training.trainer import Trainer, is_on_cuda

# Not config.tasks: the evaluation tasks must not depend on it. Large images take much memory.
_EVALUATED_AT_ONCE = {"sinusoid": 20, "omniglot": 20, "mini-imagenet": 4, "tiny-imagenet": 20}


@dataclass(frozen=True)
class Experiment:
    """A config brought to life."""

    config: Config
    loss: ModuleLoss
    method: Method
    sources: dict[str, TaskSource]  # train, val, test: of disjoint classes, where there are classes
    metrics: dict[str, Metric]
    support_metrics: dict[str, SupportMetric]  # with batch norm's statistics of the support set

    def trainer(self, *, compile: bool = False, process_group: Group | None = None) -> Trainer:
        """Adam, its rate constant or falling linearly to 2% over the second half of the run.

        Args:
            compile: the meta-gradient, on the CPU.
            process_group: as in `Trainer`.
        """
        config = self.config
        if process_group is not None and config.minutes:
            raise ValueError("minutes differ between processes: say meta_steps instead")
        optimizer = torch.optim.Adam(
            self.method.learned().values(),
            lr=config.meta_lr,
            eps=config.meta_eps,
            capturable=is_on_cuda(self.method),
        )
        watched = {name: metric for name, metric in self.metrics.items() if name != "loss"}
        source = self.sources["train"]
        if compile and is_on_cuda(self.method):
            raise ValueError("on CUDA whole meta-steps are recorded: there is nothing to compile")
        meta_gradient = (
            RecordedMetaGradient(self.method.meta_gradient, shard(source, process_group).sample(0))
            if compile
            else None
        )
        trainer = Trainer(
            self.method, source, optimizer, metrics=watched, meta_gradient=meta_gradient,
            process_group=process_group,
        )  # fmt: skip
        if config.decay == "linear":
            trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min(1.0, max(0.02, 2 - 2 * self._done(step, trainer.seconds))),
            )
        return trainer

    def adapting(self, **changes: Any) -> "Experiment":
        """The same model, adapted as the config with these changes says."""
        config = dataclasses.replace(self.config, **changes)
        method = _method(config, self.loss)
        learned = self.method.hyperparameters()
        with torch.no_grad():
            for name, tensor in method.hyperparameters().items():
                tensor.copy_(learned.get(name, tensor))
        return dataclasses.replace(self, config=config, method=method)

    def progress(self, trainer: Trainer) -> float:
        """0 at the start of the run that the config asks for, at least 1 at its end."""
        return self._done(trainer.steps, trainer.seconds)

    def _done(self, steps: int, seconds: float) -> float:
        of_time = seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return max(steps / self.config.meta_steps, of_time)


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
    _check(config)
    if config.dataset == "sinusoid":
        model = _seeded(config, lambda: mlp(1, 40, 40, 1)).to(device)
        loss = module_loss(model, nn.functional.mse_loss)
        metrics: dict[str, Metric] = {"loss": loss}
        support_metrics: dict[str, SupportMetric] = {}
        sources: dict[str, TaskSource] = {
            name: Sinusoid(
                shot=config.shot, query=query, tasks=tasks, seed=_seed(config, name), device=device
            )
            for name, query, tasks in _parts(config)
        }
    else:
        images = _images(config, data, download)
        network = _NETWORKS[config.dataset]
        model = _seeded(config, lambda: network(config.way)).to(device)
        loss = module_loss(model, nn.functional.cross_entropy)
        metrics = {"accuracy": accuracy(loss.outputs), "loss": loss}
        support_metrics = {"accuracy": support_accuracy(SupportStatistics(loss.model))}
        sources = {
            name: ImageEpisodes(
                images[name].to(device),
                way=config.way,
                shot=config.shot,
                query=query,
                tasks=tasks,
                seed=_seed(config, name),
                rotate=name == "train" and config.dataset == "omniglot",
            )
            for name, query, tasks in _parts(config)
        }
    return Experiment(config, loss, _method(config, loss), sources, metrics, support_metrics)


_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "omniglot": conv4,
    "mini-imagenet": partial(conv4, channels=3, filters=32, image=84, pool=True),
    "tiny-imagenet": partial(conv4, channels=3, filters=32, image=32, pool=True),
}


def _images(config: Config, root: str | Path, download: bool) -> dict[str, Tensor]:
    """uint8 [classes, images, ...] of train, val and test."""
    if config.dataset == "omniglot":
        return load_omniglot(root, download=download).split()
    if download:
        raise ValueError(f"--download is for omniglot: {config.dataset} has no public archive")
    load = load_mini_imagenet if config.dataset == "mini-imagenet" else load_tiny_imagenet
    return load(root)


def _check(config: Config) -> None:
    for name, choices in {"dataset": list(PRESETS), **CHOICES}.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {getattr(config, name)!r}")
    if config.meta_steps < 1:
        raise ValueError(f"meta_steps must be at least 1, got {config.meta_steps}")
    if not (math.isfinite(config.minutes) and config.minutes >= 0):
        raise ValueError(f"minutes must be finite and not negative, got {config.minutes}")


def _parts(config: Config) -> list[tuple[str, int, int]]:
    """Name, query examples per class and tasks at once of each task source."""
    evaluated = (config.eval_query, _EVALUATED_AT_ONCE[config.dataset])
    return [("train", config.query, config.tasks), ("val", *evaluated), ("test", *evaluated)]


def _method(config: Config, loss: ModuleLoss) -> Method:
    params = dict(loss.model.named_parameters())
    nonfinite = cast(Nonfinite, config.nonfinite)
    if config.method == "imaml":
        if config.learn_lr:
            raise ValueError(
                "learn_lr is for MAML: the implicit gradient does not see the step size"
            )
        lam: float | ProximalStrength = config.lam
        if config.learn_lam != "no":
            lam = ProximalStrength(params, config.lam, form=cast(Form, config.learn_lam))
        return IMAML(
            loss,
            params,
            lam=lam,
            inner=_inner(config),
            linear=_linear(config),
            adapt_proximal=config.eval_proximal,
            nonfinite=nonfinite,
        )
    if config.learn_lam != "no":
        raise ValueError(f"learn_lam is for imaml, got method {config.method!r}")
    if config.inner != "gd":
        raise ValueError(f"inner is for imaml, got method {config.method!r} and {config.inner!r}")
    descent = GradientDescent(lr=config.inner_lr, steps=config.inner_steps)
    if config.method in ("fomaml", "reptile"):
        if config.learn_lr:
            raise ValueError(f"learn_lr needs a second-order method, got {config.method!r}")
        return (FOMAML if config.method == "fomaml" else Reptile)(
            loss, params, inner=descent, nonfinite=nonfinite
        )
    if config.method == "truncated-maml":
        return TruncatedMAML(
            loss,
            params,
            last=config.last,
            inner=descent,
            learn_lr=config.learn_lr,
            nonfinite=nonfinite,
        )
    if config.method == "maml-accelerated":
        return MAML(
            loss,
            params,
            inner=descent,
            lam=config.lam,
            accelerated=True,
            learn_lr=config.learn_lr,
            nonfinite=nonfinite,
        )
    return MAML(loss, params, inner=descent, learn_lr=config.learn_lr, nonfinite=nonfinite)


def _inner(config: Config) -> InnerSolver:
    lr, steps = config.inner_lr, config.inner_steps
    if config.inner == "gd-then-proximal":
        return DescentThenProximal(lr=lr, steps=steps)
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
    if config.linear == "cg-authors-code":
        return AuthorsCodeCG(max_iter=max_iter, damping=damping, curvature=curvature)
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
