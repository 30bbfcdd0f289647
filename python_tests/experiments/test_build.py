"""Experiments: what a Config builds, and adapting it differently in evaluation."""

import dataclasses
import math

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
from imaml_ext.data import SimilarClasses
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.experiments.build import build
from imaml_ext.experiments.models import conv4
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import CHOICES, DATASETS
from imaml_ext.training.checkpoint import evaluated_tensors


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


@pytest.mark.parametrize("dataset", ["omniglot", "mini-imagenet", "tiny-imagenet"])
def test_the_remedy_for_missing_data_is_an_option_of_the_command_line(dataset, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^no .*: expected .*; give .* with --data"
    ) as error:
        build(PRESETS[dataset], data=tmp_path)
    assert "root" not in str(error.value).replace(str(tmp_path), "")


def test_the_learning_rate_is_constant_or_decays():
    rates = {}
    for decay in ("constant", "linear", "cosine"):
        config = dataclasses.replace(
            PRESETS["sinusoid"], tasks=1, inner_steps=1, meta_lr=2**-10, meta_steps=8, decay=decay
        )
        trainer, rates[decay] = build(config).trainer(), []
        for _ in range(8):
            trainer.step()
            rates[decay].append(2**10 * trainer.optimizer.param_groups[0]["lr"])
    assert rates["constant"] == [1.0] * 8
    assert rates["linear"] == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.02])
    cosine = [0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(1, 9)]
    assert rates["cosine"] == pytest.approx(cosine, abs=1e-12)


def test_a_training_starts_from_the_evaluated_tensors_of_another():
    small = dataclasses.replace(PRESETS["sinusoid"], tasks=2, inner_steps=1, average=0.5)
    trainer = build(small).trainer()
    trainer.step()
    trainer.step()
    state = trainer.state_dict()
    expected = evaluated_tensors(state)
    assert not torch.equal(expected["0.bias"], state["learned"]["0.bias"])
    other = build(dataclasses.replace(small, seed=1))
    assert not torch.equal(other.method.params["0.bias"], expected["0.bias"])
    started = other.trainer(start=state).method.params
    for name, tensor in expected.items():
        assert torch.equal(started[name], tensor)


@pytest.mark.parametrize("change", [lambda t: None, lambda t: torch.ones(3)], ids=["none", "other"])
def test_a_last_layer_that_the_start_lacks_becomes_zero(change):
    experiment = build(PRESETS["sinusoid"])
    tensors = {n: t.detach().clone() for n, t in experiment.method.params.items()}
    for name in ("4.weight", "4.bias"):
        tensors[name] = change(tensors[name])
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    experiment.initialise({"learned": tensors})
    assert not experiment.method.params["4.weight"].any()
    assert not experiment.method.params["4.bias"].any()
    assert torch.equal(experiment.method.params["2.weight"], tensors["2.weight"])
    with pytest.raises(ValueError, match=r"start has no 2\.bias of shape \[40\]"):
        experiment.initialise({"learned": tensors | {"2.bias": torch.ones(3)}})


def test_hyperparameters_that_the_start_lacks_keep_their_values():
    experiment = build(dataclasses.replace(PRESETS["sinusoid"], learn_lam="scalar"))
    before = {n: t.detach().clone() for n, t in experiment.method.hyperparameters().items()}
    experiment.initialise({"learned": dict(experiment.method.params)})
    for name, tensor in experiment.method.hyperparameters().items():
        assert torch.equal(tensor, before[name])


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setitem(conv4.__kwdefaults__, "filters", 8)
    images = (255 * torch.rand(36, 20, 28, 28)).to(torch.uint8)
    parts = dict(zip(("train", "val", "test"), images.split(12), strict=True))
    few = dataclasses.replace(DATASETS["omniglot"], images=lambda *_: parts)
    monkeypatch.setitem(DATASETS, "omniglot", few)


def test_hard_tasks_are_similar_by_the_features_that_training_starts_from(few_images):
    settings = {"hard_tasks": 0.75, "neighbours": 6, "tasks": 3, "inner_steps": 1}
    config = dataclasses.replace(PRESETS["omniglot"], **settings)
    with pytest.raises(ValueError, match="hard_tasks needs images, and start"):
        build(config).trainer()
    with pytest.raises(ValueError, match="hard_tasks needs images, and start"):
        build(dataclasses.replace(PRESETS["sinusoid"], hard_tasks=0.5)).trainer()
    start = {"learned": dict(build(dataclasses.replace(config, seed=3)).method.params)}
    experiment = build(config)
    source = experiment.trainer(start=start).source
    assert (source.hard, source.similar.groups.shape) == (0.75, (48, 7))
    body = experiment.loss.model[:-1]
    expected = SimilarClasses.nearest(source.images, body, neighbours=6, rotate=True)
    assert torch.equal(source.similar.groups, expected.groups)
    assert experiment.sources["val"].similar is None


def test_query_batches_are_normalised_as_in_evaluation(few_images):
    settings = {"query": 4, "tasks": 2, "inner_steps": 1, "query_batches": 2}
    experiment = build(dataclasses.replace(PRESETS["omniglot"], **settings))
    batch = experiment.sources["train"].sample(0)
    out = experiment.method.meta_gradient(batch)
    x, y = batch.query
    for task in range(2):
        phi = {name: tensor[task] for name, tensor in out.adapted.items()}
        images = x[task].view(5, 2, 2, 1, 28, 28)  # class, image of a batch, batch
        expected = [
            experiment.loss(phi, (images[:, :, k].flatten(0, 1), y[task, ::2])) for k in (0, 1)
        ]
        torch.testing.assert_close(out.query_loss[task], torch.stack(expected).mean().detach())
    assert experiment.method.loss is experiment.loss  # of the support set


def test_a_query_scale_multiplies_the_logits_of_the_query_loss_alone(few_images):
    settings = {"query": 2, "tasks": 2, "inner_steps": 1, "query_scale": 3.0}
    experiment = build(dataclasses.replace(PRESETS["omniglot"], **settings))
    batch = experiment.sources["train"].sample(0)
    out = experiment.method.meta_gradient(batch)
    plain = build(dataclasses.replace(PRESETS["omniglot"], **settings | {"query_scale": 1.0}))
    assert torch.equal(out.support_loss, plain.method.meta_gradient(batch).support_loss)
    x, y = batch.query
    for task in range(2):
        phi = {name: tensor[task] for name, tensor in out.adapted.items()}
        logits = 3 * experiment.loss.outputs(phi, x[task]).detach()
        expected = torch.nn.functional.cross_entropy(logits, y[task])
        torch.testing.assert_close(out.query_loss[task], expected)


@pytest.mark.parametrize("count", [0, 3])
def test_query_batches_divide_the_query_set(count):
    with pytest.raises(ValueError, match=f"query_batches must divide query=10, got {count}"):
        build(dataclasses.replace(PRESETS["sinusoid"], query_batches=count))


def test_the_ridge_head_trains_with_its_own_number_of_classes(few_images):
    settings = {"method": "ridge-head", "train_way": 9, "tasks": 1, "meta_lr": 0.01}
    experiment = build(dataclasses.replace(PRESETS["omniglot"], **settings))
    trainer = experiment.trainer()
    assert trainer.source.sample(0).support[1].max() == 8
    before = {n: t.detach().clone() for n, t in experiment.method.learned().items()}
    trainer.step()
    assert not any(torch.equal(before[n], t) for n, t in experiment.method.learned().items())
    assert "accuracy" in experiment.evaluate("val", 3).mean  # of 5-way tasks
    with pytest.raises(ValueError, match="train_way is for ridge-head, got 9 with method 'imaml'"):
        build(dataclasses.replace(PRESETS["omniglot"], train_way=9))
    with pytest.raises(ValueError, match="ridge-head is for classification"):
        build(dataclasses.replace(PRESETS["sinusoid"], method="ridge-head"))
