"""Builds the model, method, task sources and trainer of a Config."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imaml_ext._checks import check_choice, check_range
from imaml_ext.data import ImageEpisodes, SimilarClasses, Sinusoid
from imaml_ext.data.tasks import TaskSource
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.registry import CHOICES, DATASETS, Images, make_method
from imaml_ext.methods.base import Method
from imaml_ext.problem.module_loss import ModuleLoss, module_loss
from imaml_ext.training.budget import Budget
from imaml_ext.training.checkpoint import evaluated_tensors, load_checkpoint
from imaml_ext.training.distributed import Group
from imaml_ext.training.evaluation import (
    Evaluation,
    Metric,
    SupportMetric,
    accuracy,
    evaluate,
    support_accuracy,
)
from imaml_ext.training.support_statistics import SupportStatistics
from imaml_ext.training.trainer import Compile, Trainer
from imaml_ext.training.weight_averaging import average_weights


@dataclass(frozen=True)
class Experiment:
    """A Config and the objects that it specifies.

    Attributes:
        sources: by split, "train", "val" and "test"; their classes, if any, are disjoint.
        support_metrics: with batch norm statistics of the support set.
    """

    config: Config
    loss: ModuleLoss
    method: Method
    sources: Mapping[str, TaskSource]
    metrics: dict[str, Metric]
    support_metrics: dict[str, SupportMetric]

    def trainer(
        self,
        *,
        start: Mapping[str, Any] | None = None,
        compile: Compile = "auto",
        process_group: Group | None = None,
    ) -> Trainer:
        """A trainer with Adam, on a constant or a decaying learning rate.

        Args:
            start: the state of a checkpoint, from which the learned tensors are initialised and the
                similar classes of hard tasks are found; default: that of `config.start`, if any.
            compile, process_group: as in `Trainer`.

        Raises:
            FileNotFoundError, ValueError: as `load_checkpoint`, or a setting is incompatible with
                start, the group or the device.
        """
        config, source = self.config, self.sources["train"]
        if start is None and config.start:
            path = Path(config.start)
            start = load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
        if start is not None:
            self.initialise(start)
        if config.hard_tasks:
            source = self._with_hard_tasks(source, start)
        on_cuda = self.method.layout.device.type == "cuda"
        if process_group is not None and config.minutes:
            raise ValueError("minutes is for one process, as clocks differ: use meta_steps")
        optimizer = torch.optim.Adam(
            self.method.learned().values(),
            lr=config.meta_lr,
            eps=config.meta_eps,
            capturable=on_cuda,
        )
        metrics = {name: metric for name, metric in self.metrics.items() if name != "loss"}
        if config.train_way not in (0, config.way):
            metrics = {}  # they use the model's own number of classes
        check_range("average", config.average, "[0, 1)")
        if config.average:
            average_weights(optimizer, config.average)
        budget = Budget(config.meta_steps, config.minutes)
        scheduler = None
        if config.decay != "constant":
            factor = _DECAYS[config.decay]
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda _: factor(min(1.0, budget.progress))
            )
        return Trainer(
            self.method,
            source,
            optimizer,
            scheduler=scheduler,
            metrics=metrics,
            compile=compile,
            budget=budget,
            process_group=process_group,
        )

    @torch.no_grad()
    def initialise(self, start: Mapping[str, Any]) -> None:
        """Copy the learned tensors from the state of a checkpoint.

        The last layer becomes 0 if the state has none, as that of a ridge head, or one for another
        number of classes. Hyper-parameters that the state does not have keep their values.

        Raises:
            ValueError: the state lacks another layer.
        """
        tensors, learned = evaluated_tensors(start), self.method.learned() | self.method.buffers()
        *_, (last, _) = self.loss.model.named_children()
        for name, tensor in learned.items():
            if name in tensors and tensors[name].shape == tensor.shape:
                tensor.copy_(tensors[name])
            elif name.startswith(f"{last}."):
                tensor.zero_()
            elif name not in self.method.hyperparameters():
                raise ValueError(f"start has no {name} of shape {list(tensor.shape)}")

    def _with_hard_tasks(self, source: TaskSource, start: Mapping[str, Any] | None) -> TaskSource:
        config = self.config
        model = self.loss.model
        if start is None or not isinstance(source, ImageEpisodes):
            raise ValueError(
                "hard_tasks needs images, and start, whose features tell which classes are similar"
            )
        assert isinstance(model, nn.Sequential)
        similar = SimilarClasses.nearest(
            source.images,
            model[:-1],
            neighbours=config.neighbours,
            rotate=source.rotate,
        )
        return source.with_similar(similar, config.hard_tasks)

    def evaluate(self, split: str, tasks: int) -> Evaluation:
        """Evaluate the method on tasks of "val" or "test", with all metrics."""
        return evaluate(
            self.method,
            self.sources[split],
            self.metrics,
            tasks=tasks,
            support_metrics=self.support_metrics,
        )

    def adapting(self, **changes: Any) -> "Experiment":
        """The same model and learned tensors, adapted with some settings of the config changed."""
        config = dataclasses.replace(self.config, **changes)
        method = make_method(config, self.loss)
        learned = self.method.hyperparameters()
        with torch.no_grad():
            for name, tensor in method.hyperparameters().items():
                tensor.copy_(learned.get(name, tensor))
        return dataclasses.replace(self, config=config, method=method)


_DECAYS: dict[str, Callable[[float], float]] = {  # factor of the rate, by progress from 0 to 1
    "linear": lambda progress: min(1.0, max(0.02, 2 - 2 * progress)),
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}


def percentages(result: Evaluation, prefix: str = "") -> dict[str, float]:
    """The accuracies of an evaluation and their 95% half-widths in percent, by prefixed name."""
    return {
        f"{prefix}{kind}{name}": 100 * values[f"{kind}accuracy"]
        for kind in ("", "support_")
        if f"{kind}accuracy" in result.mean
        for name, values in (("accuracy", result.mean), ("ci95", result.ci95))
    }


def build(
    config: Config,
    *,
    data: str | Path = "data",
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Experiment:
    """Build model, method and task sources. The initial model depends on the seed alone.

    Args:
        data: root folder of the data sets.
        download: whether to download the data set if it is missing.

    Raises:
        FileNotFoundError, ValueError: the data is missing or not usable, or a setting is invalid.
    """
    for name, choices in CHOICES.items():
        check_choice(name, getattr(config, name), choices)
    Budget(config.meta_steps, config.minutes)  # raises before the data is loaded
    dataset = DATASETS[config.dataset]
    check_choice(f"network for {config.dataset}", config.network, dataset.networks)
    images = dataset.images(data, download) if dataset.images else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = dataset.networks[config.network](config.way)
    model.to(device)
    metrics: dict[str, Metric] = {}
    support_metrics: dict[str, SupportMetric] = {}
    if images is None:
        loss = module_loss(model, nn.functional.mse_loss)
    else:
        loss = module_loss(model, nn.functional.cross_entropy)
        metrics["accuracy"] = accuracy(loss.outputs)
        if config.network == "paper":  # the others have running statistics
            support_metrics["accuracy"] = support_accuracy(SupportStatistics(model))
    metrics["loss"] = loss
    sources = {split: _source(config, split, images, device) for split in ("train", "val", "test")}
    method = make_method(config, loss)
    return Experiment(config, loss, method, sources, metrics, support_metrics)


def _source(
    config: Config, split: str, images: Images | None, device: torch.device | str
) -> TaskSource:
    dataset, training = DATASETS[config.dataset], split == "train"
    # Evaluation tasks depend neither on the seed nor on the number of training tasks.
    settings: dict[str, Any] = {
        "shot": config.shot,
        "query": config.query if training else config.eval_query,
        "tasks": config.tasks if training else dataset.eval_tasks_at_once,
        "seed": config.seed if training else {"val": 101, "test": 102}[split],
    }
    if images is None:
        return Sinusoid(**settings, device=device)
    rotate = training and dataset.rotate
    way = config.train_way if training and config.train_way else config.way
    return ImageEpisodes(images[split].to(device), way=way, rotate=rotate, **settings)
