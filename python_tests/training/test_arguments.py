"""Arguments of a trainer or an evaluation that would fail later, or be ignored, are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from imaml_ext import FOMAML, IMAML, MAML, ProximalStrength, Trainer, evaluate, module_loss
from imaml_ext.data import Sinusoid

MODEL = nn.Linear(1, 1)
LOSS = module_loss(MODEL, nn.functional.mse_loss)
SOURCE = Sinusoid(tasks=3)


def method(**settings):
    return IMAML(LOSS, dict(MODEL.named_parameters()), **settings)


def sgd(tensors):
    return torch.optim.SGD(tensors, lr=0.1)


def refused(error, message, **arguments):
    with pytest.raises(error, match=message) as caught:
        Trainer(arguments.pop("method", None) or method(), SOURCE, **arguments)
    assert "\n" not in str(caught.value)


def test_an_optimizer_that_lacks_a_learned_tensor_is_refused_by_name():
    copied = copy.deepcopy(MODEL)
    all_lack = r"optimizer lacks 2 of the 2 tensors that the method learns \(weight, bias\)"
    refused(ValueError, all_lack, optimizer=sgd(copied.parameters()))
    refused(ValueError, r"lacks 1 of the 2 .* \(bias\)", optimizer=sgd([MODEL.weight]))
    strength = method(lam=ProximalStrength(dict(MODEL.named_parameters())))
    optimizer = sgd(MODEL.parameters())
    refused(ValueError, r"1 of the 3 .* \(lam.log\)", method=strength, optimizer=optimizer)
    rate = MAML(LOSS, dict(MODEL.named_parameters()), learn_lr=True)
    refused(ValueError, r"1 of the 3 .* \(log_lr\)", method=rate, optimizer=optimizer)
    shared = IMAML(LOSS, {"weight": MODEL.weight}, shared={"bias": MODEL.bias})
    refused(ValueError, r"\(bias\)", method=shared, optimizer=sgd([MODEL.weight]))


def test_an_optimizer_with_tensors_that_get_no_gradient_is_reported():
    head = {"weight": MODEL.weight}
    with pytest.warns(UserWarning, match=r"1 of the 2 tensors of optimizer .* shape \[1\]"):
        Trainer(FOMAML(LOSS, head), SOURCE, sgd(MODEL.parameters()))
    frozen = copy.deepcopy(MODEL)
    frozen.bias.requires_grad_(False)
    loss = module_loss(frozen, nn.functional.mse_loss)
    Trainer(FOMAML(loss, {"weight": frozen.weight}), SOURCE, sgd(frozen.parameters()))


def test_the_groups_of_an_optimizer_count_together():
    groups = [{"params": [MODEL.weight]}, {"params": [MODEL.bias], "lr": 0.2}]
    Trainer(method(), SOURCE, sgd(groups))


def test_anything_but_one_optimizer_is_refused():
    over = r"create it over method.learned\(\).values\(\), with groups for several rates"
    several = [sgd([MODEL.weight]), sgd([MODEL.bias])]
    for optimizer, got in ((several, "list"), ([], "list"), (torch.optim.Adam, "the class Adam")):
        refused(TypeError, f"of Optimizer, got {got}: {over}", optimizer=optimizer)


def test_a_scheduler_that_would_not_change_the_training_is_refused():
    optimizer = sgd(MODEL.parameters())
    other = StepLR(sgd(MODEL.parameters()), 1)
    of_another = "scheduler must be one of the trainer's optimizer"
    refused(ValueError, of_another, optimizer=optimizer, scheduler=other)
    refused(ValueError, of_another, scheduler=other)
    plateau = ReduceLROnPlateau(optimizer)
    refused(ValueError, "step needs a value", optimizer=optimizer, scheduler=plateau)
    refused(TypeError, "scheduler must be .* LRScheduler, got the class StepLR", scheduler=StepLR)
    Trainer(method(), SOURCE, optimizer, scheduler=StepLR(optimizer, 1)).step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": LOSS}, "method must be an instance of Method, got ModuleLoss"),
        ({"method": IMAML}, "got the class IMAML"),
        ({"budget": 100}, r"budget must be .* Budget, got int: pass Budget\(steps\)"),
        ({"log": "log.jsonl"}, r"log must be a function of \(split, record\), got str"),
        ({"capture": "graph"}, "capture must be a function"),
        ({"meta_gradient": method()}, r"got IMAML: pass method.meta_gradient"),
        ({"process_group": "gloo"}, "process_group must be .* ProcessGroup, got str"),
        ({"metrics": LOSS}, r"metrics must map names .*, got ModuleLoss: pass a dict"),
        ({"metrics": [LOSS]}, "got list: pass a dict"),
        ({"metrics": {"mse": 3}}, r"metrics\['mse'\] must be a function of \(params, query\)"),
        ({"metrics": {3: LOSS}}, "names in metrics must be strings, got 3"),
        ({"metrics": {"a": nn.CrossEntropyLoss()}}, r"got torch's CrossEntropyLoss: pass a loss"),
        ({"metrics": {"a": LOSS.outputs}}, r"metrics\['a'\] returns outputs.*accuracy\("),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, message):
    refused(TypeError, message, **arguments)


def test_a_metric_cannot_replace_an_entry_of_the_record():
    for name in ("loss", "step", "seconds", "failed", "support_loss", "split"):
        refused(
            ValueError, rf"metrics\['{name}'\] is an entry of every record", metrics={name: LOSS}
        )
    trainer = Trainer(method(), SOURCE)
    with pytest.raises(ValueError, match=r"metrics\['step'\] is an entry of every record"):
        trainer.validate(SOURCE, {"step": LOSS}, tasks=3)
    assert trainer.validate(SOURCE, {"loss": LOSS}, tasks=3)["step"] == 0


METRICS = {
    "a shape": (ValueError, lambda params, data: data[1], r"scalar, got shape \[10, 1\]"),
    "a number": (TypeError, lambda params, data: 3.0, "must return a tensor, got float"),
    "nothing": (TypeError, lambda params, data: None, "must return a tensor, got NoneType"),
    "a pair": (TypeError, lambda params, data: (data[1].mean(),) * 2, "got tuple"),
    "complex": (TypeError, lambda params, data: data[1].mean() * 1j, "got torch.complex64"),
    "item": (RuntimeError, lambda params, data: data[1].mean().item(), "reads the value"),
}


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_that_is_no_scalar_tensor_is_named(kind):
    error, metric, message = METRICS[kind]
    with pytest.raises(error, match=rf"^metrics\['m'\] .*{message}") as caught:
        evaluate(method(), SOURCE, {"m": metric}, tasks=3)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=rf"^metrics\['m'\] .*{message}"):
        Trainer(method(), SOURCE, metrics={"m": metric}).step()
    joint = {"m": lambda params, support, query: metric(params, query)}
    with pytest.raises(error, match=rf"^support_metrics\['m'\] .*{message}"):
        evaluate(method(), SOURCE, {}, tasks=3, support_metrics=joint)


def test_an_evaluation_of_anything_but_metrics_by_name_is_refused():
    for metrics in (LOSS, "loss", None, [LOSS]):
        with pytest.raises(TypeError, match="metrics must map names to functions"):
            evaluate(method(), SOURCE, metrics, tasks=3)
    with pytest.raises(TypeError, match="support_metrics must map names to functions"):
        evaluate(method(), SOURCE, {}, tasks=3, support_metrics=LOSS)
    with pytest.raises(
        TypeError, match=r"\(params, support, query\), got ModuleLoss\(params, data\)"
    ):
        evaluate(method(), SOURCE, {}, tasks=3, support_metrics={"loss": LOSS})
    with pytest.raises(ValueError, match="metrics is empty"):
        evaluate(method(), SOURCE, {}, tasks=3)
    with pytest.raises(TypeError, match="method must be an instance of Method, got Linear"):
        evaluate(MODEL, SOURCE, {"loss": LOSS}, tasks=3)


def test_two_metrics_of_one_name_are_refused():
    joint = {"loss": lambda params, support, query: LOSS(params, query)}
    with pytest.raises(ValueError, match="both report 'support_loss'"):
        evaluate(method(), SOURCE, {"support_loss": LOSS}, tasks=3, support_metrics=joint)
