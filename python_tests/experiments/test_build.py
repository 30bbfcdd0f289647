"""Experiments: what a Config builds, and adapting it differently in evaluation."""

import dataclasses

import pytest
import torch

from imaml_ext import (
    FOMAML,
    IMAML,
    LBFGS,
    MAML,
    MINRES,
    Adam,
    ConjugateGradient,
    GradientDescent,
    HessianFree,
    NeumannSeries,
    Reptile,
    TruncatedMAML,
)  # fmt: skip
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.experiments.build import build
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import CHOICES, DATASETS


def test_evaluation_tasks_do_not_depend_on_the_training_batch():
    few, many = (
        build(dataclasses.replace(PRESETS["sinusoid"], tasks=tasks)).sources for tasks in (3, 30)
    )
    for name in ("val", "test"):
        assert torch.equal(few[name].sample(2).query[0], many[name].sample(2).query[0])


def test_without_the_proximal_term_imaml_adapts_by_plain_descent():
    config = dataclasses.replace(PRESETS["sinusoid"], lam=5.0, inner_steps=3)
    with_term = build(config)
    without = with_term.adapting(eval_proximal=False)
    support = with_term.sources["test"].sample(0).support
    maml = with_term.adapting(method="maml").method.adapt(support)
    for name, phi in without.method.adapt(support).items():
        torch.testing.assert_close(phi, maml[name])
        assert not torch.allclose(phi, with_term.method.adapt(support)[name])


def test_changed_adaptation_settings_keep_the_learned_tensors():
    one = build(dataclasses.replace(PRESETS["sinusoid"], learn_lam="scalar"))
    with torch.no_grad():
        for tensor in one.method.hyperparameters().values():
            tensor += 1
    other = one.adapting(eval_proximal=False, inner_steps=3).method
    for name, tensor in one.method.hyperparameters().items():
        torch.testing.assert_close(other.hyperparameters()[name], tensor)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, (IMAML, GradientDescent, ConjugateGradient)),
        ({"inner": "adam", "linear": "minres"}, (IMAML, Adam, MINRES)),
        ({"inner": "hessian-free", "linear": "neumann"}, (IMAML, HessianFree, NeumannSeries)),
        ({"inner": "lbfgs", "linear": "cg-jacobi"}, (IMAML, LBFGS, ConjugateGradient)),
        (
            {"inner": "gd-then-proximal", "linear": "cg-authors-code"},
            (IMAML, DescentThenProximal, AuthorsCodeCG),
        ),
        ({"method": "maml"}, (MAML, GradientDescent, None)),
        ({"method": "truncated-maml"}, (TruncatedMAML, GradientDescent, None)),
        ({"method": "fomaml"}, (FOMAML, GradientDescent, None)),
        ({"method": "reptile"}, (Reptile, GradientDescent, None)),
    ],
    ids=str,
)
def test_names_refer_to_methods_and_solvers(settings, kinds):
    config = dataclasses.replace(PRESETS["sinusoid"], cg_steps=3, damping=0.5, **settings)
    method = build(config).method
    linear = getattr(method, "linear", None)
    assert (type(method), type(method.inner)) == kinds[:2]
    assert linear is None if kinds[2] is None else type(linear) is kinds[2]
    assert method.inner.steps == config.inner_steps
    if linear is not None:
        assert (linear.max_iter, linear.damping, linear.curvature) == (3, 0.5, "ggn")


@pytest.mark.parametrize("name", list(CHOICES))
def test_an_unknown_name_is_refused_and_the_known_names_are_listed(name):
    config = dataclasses.replace(PRESETS["sinusoid"], **{name: "abacus"})
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'abacus'"):
        build(config)


def test_every_data_set_has_a_preset():
    assert list(PRESETS) == list(DATASETS)
    assert all(config.dataset == name for name, config in PRESETS.items())


@pytest.mark.parametrize("dataset", ["mini-imagenet", "tiny-imagenet"])
def test_data_sets_without_an_archive_cannot_be_downloaded(dataset):
    with pytest.raises(ValueError, match="--download is for omniglot"):
        build(PRESETS[dataset], download=True)


def test_the_learning_rate_is_constant_or_decays_linearly_to_two_percent():
    rates = {}
    for decay in ("constant", "linear"):
        config = dataclasses.replace(
            PRESETS["sinusoid"], tasks=1, inner_steps=1, meta_lr=2**-10, meta_steps=8, decay=decay
        )
        trainer, rates[decay] = build(config).trainer(), []
        for _ in range(8):
            trainer.step()
            rates[decay].append(2**10 * trainer.optimizer.param_groups[0]["lr"])
    assert rates["constant"] == [1.0] * 8
    assert rates["linear"] == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.02])
