"""A user's program for `mypy --strict`: the results of the public API have types, not Any."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    MINRES,
    Adam,
    ConjugateGradient,
    Evaluation,
    External,
    GradientDescent,
    HessianFree,
    ImplicitMetaGradient,
    MetaGradient,
    Method,
    NeumannSeries,
    Proximal,
    ProximalStrength,
    RecordedMetaGradient,
    Reptile,
    Solution,
    TaskBatch,
    TaskSource,
    Trainer,
    adapt,
    build_info,
    conjugate_gradient,
    evaluate,
    implicit_meta_grad,
    module_loss,
)
from imaml_ext.data import ImageEpisodes, Omniglot, Sinusoid, load_omniglot
from imaml_ext.experiments.models import conv4, mlp
from imaml_ext.training.evaluation import accuracy


class Lines:
    """A source of tasks, without a base class."""

    def sample(self, step: int) -> TaskBatch:
        x = torch.randn(4, 10, 1)
        return TaskBatch(support=(x, 2 * x), query=(x, 2 * x))


def squared(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return (x @ params["w"] - y).square().mean()


def one_descent_step(problem: Proximal) -> Tensor:
    value, gradient = problem.value_and_gradient(problem.start())
    assert_type(value, Tensor)
    return problem.start() - gradient


def meta_gradients(model: nn.Module, batch: TaskBatch) -> None:
    loss = module_loss(model, nn.functional.mse_loss)
    params = dict(model.named_parameters())
    for inner in (GradientDescent(), Adam(), LBFGS(), HessianFree(), External(one_descent_step)):
        for linear in (ConjugateGradient(), MINRES(), NeumannSeries()):
            out = implicit_meta_grad(
                loss, params, batch.support, batch.query, lam={"w": torch.ones(())}, inner=inner,
                linear=linear,
            )  # fmt: skip
            assert_type(out, ImplicitMetaGradient)
            assert_type(out.params, dict[str, Tensor])
            assert_type(out.adapted, dict[str, Tensor])
            assert_type(out.named(), dict[str, Tensor])
            assert_type(out.query_loss, Tensor)
            assert_type(out.failed, Tensor)
            assert_type(out.inner, Solution)
            assert_type(out.inner.error_estimate, Tensor)
            assert_type(out.linear, Solution)
            assert_type(out.describe(), str)
    assert_type(adapt(squared, params, batch.support, lam=1.0), dict[str, Tensor])
    solution = conjugate_gradient(lambda p: 2 * p, torch.ones(3, 4), max_iter=5)
    assert_type(solution.value, Tensor)
    assert_type(solution.status, Tensor)


def training(params: Mapping[str, Tensor], source: TaskSource, file: Path) -> Evaluation:
    implicit = IMAML(squared, params, lam=ProximalStrength(params))
    assert_type(implicit.meta_gradient(source.sample(0)), ImplicitMetaGradient)
    methods: list[Method] = [
        implicit,
        MAML(squared, params, accelerated=True, lam=0.1),
        FOMAML(squared, params),
        Reptile(squared, params),
    ]
    for method in methods:
        trainer = Trainer(method, source, torch.optim.SGD(method.learned().values(), lr=0.1))
        assert_type(trainer.step(), Mapping[str, float])
        assert_type(trainer.history, list[dict[str, float]])
        trainer.save(file, {"lr": 0.1})
        assert_type(method.adapt(source.sample(0).support), dict[str, Tensor])
    recorded = RecordedMetaGradient(methods[0].meta_gradient, source.sample(0))
    assert_type(recorded(source.sample(1)), MetaGradient)
    evaluation = evaluate(methods[0], source, {"loss": squared}, tasks=10)
    assert_type(evaluation.mean, dict[str, float])
    return evaluation


def images(root: Path) -> None:
    omniglot = load_omniglot(root)
    assert_type(omniglot, Omniglot)
    assert_type(omniglot.split(), dict[str, Tensor])
    source = ImageEpisodes(omniglot.split()["train"], way=5, shot=1, query=1, tasks=4)
    model = conv4(5)
    assert_type(model, nn.Sequential)
    loss = module_loss(model, nn.functional.cross_entropy)
    method = MAML(loss, dict(model.named_parameters()))
    metric = accuracy(loss.outputs)
    assert_type(evaluate(method, source, {"accuracy": metric}, tasks=600).ci95, dict[str, float])


sources: list[TaskSource] = [Lines(), Sinusoid(tasks=4)]
assert_type(mlp(1, 40, 1), nn.Sequential)
assert_type(build_info(), dict[str, str])
