"""Evaluation: means and intervals over the right number of tasks, and accuracies."""

import pytest
import torch
from trainings import make_method

from imaml_ext import evaluate
from imaml_ext.data import Sinusoid
from imaml_ext.training.evaluation import accuracy, per_task, support_accuracy


def test_the_mean_and_interval_are_over_the_first_tasks(device):
    method = make_method(device)
    source = Sinusoid(tasks=8, device=device, dtype=torch.float64)
    got = evaluate(method, source, {"loss": method.loss}, tasks=20)
    values = []
    for step in range(3):
        batch = source.sample(step)
        phi = method.adapt(batch.support)
        values += torch.func.vmap(method.loss)(phi, batch.query).tolist()
    values = torch.tensor(values[:20], dtype=torch.float64)
    assert got.tasks == 20
    assert got.mean["loss"] == pytest.approx(values.mean().item())
    assert got.ci95["loss"] == pytest.approx(1.96 * values.std(correction=0).item() / 20**0.5)


def test_support_metrics_receive_the_support_set(device):
    method = make_method(device)
    source = Sinusoid(tasks=3, device=device, dtype=torch.float64)

    def difference(params, support, query):
        return query[0].mean() - support[0].mean()

    got = evaluate(method, source, {}, tasks=3, support_metrics={"difference": difference})
    batch = source.sample(0)
    expected = (batch.query[0].mean((1, 2)) - batch.support[0].mean((1, 2))).mean().item()
    assert got.mean == {"support_difference": pytest.approx(expected)}


def test_an_evaluation_of_no_tasks_is_refused():
    method = make_method("cpu")
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        evaluate(method, Sinusoid(tasks=3), {"loss": method.loss}, tasks=0)


def test_accuracy_is_the_fraction_of_labels_with_the_largest_output():
    outputs = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    labels = torch.tensor([0, 1, 1, 0])
    metric = accuracy(lambda params, x: outputs[x])
    assert metric({}, (torch.arange(4), labels)).item() == 0.75
    joint = support_accuracy(lambda params, support_x, x: outputs[x].roll(support_x, 1))
    assert joint({}, (2, None), (torch.arange(4), labels)).item() == 0.25


def test_the_accuracy_of_a_loss_is_refused():
    loss = make_method("cpu").loss
    with pytest.raises(TypeError, match=r"outputs must return outputs.*pass loss\.outputs"):
        accuracy(loss)


def test_a_method_of_a_loss_may_be_a_metric():
    method = make_method("cpu")
    source = Sinusoid(tasks=3, dtype=torch.float64)
    assert evaluate(method, source, {"a": method.loss.__call__}, tasks=3).mean["a"] > 0


def test_a_metric_per_task_has_no_graph(device):
    phi = {"w": torch.tensor([[1.0], [2.0], [3.0]], device=device, requires_grad=True)}
    x = torch.tensor([[1.0], [10.0], [100.0]], device=device)
    got = per_task(lambda params, x: (params["w"] * x).sum(), phi, x)
    assert got.tolist() == [1, 20, 300]
    assert not got.requires_grad
