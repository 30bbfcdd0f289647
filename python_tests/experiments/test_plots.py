"""Plots of a training: the curves that they show."""

import dataclasses

import numpy as np
import pytest
import torch

from imaml_ext.experiments import plots
from imaml_ext.experiments.build import build
from imaml_ext.experiments.presets import PRESETS


@pytest.fixture
def figures(monkeypatch):
    """Figures in place of files."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure) or path)
    return saved


def lines(axis):
    return {line.get_label(): line.get_xydata() for line in axis.get_lines()}


def test_learning_curves_are_running_means_in_percent(figures, tmp_path):
    history = [{"step": s, "accuracy": s / 200, "loss": 1 / s} for s in range(1, 101)]
    validation = [{"step": 50, "accuracy": 0.3, "loss": 2.0}]
    plots.learning_curves(history, validation, tmp_path / "x.png")
    accuracy, loss = figures[0].axes
    training = lines(accuracy)["training, query set, mean of 2 steps"]
    steps = np.arange(2, 101)
    np.testing.assert_allclose(training, np.stack([steps, (steps - 0.5) / 2], 1))
    assert lines(accuracy)["validation, unseen tasks"].tolist() == [[50, 30]]
    assert lines(loss)["validation, unseen tasks"].tolist() == [[50, 2]]


def test_fits_show_the_model_before_and_after_adaptation(figures, tmp_path):
    one = build(dataclasses.replace(PRESETS["sinusoid"], inner_steps=2))
    plots.sinusoid_fits(one, "test", tmp_path / "x.png")
    axes = figures[0].axes
    assert len(axes) == 4
    phi = one.method.adapt(one.sources["test"].sample(0).support)
    for task, axis in enumerate(axes):
        for name, params in (
            ("before adaptation", one.method.params),
            ("after adaptation", {name: tensor[task] for name, tensor in phi.items()}),
        ):
            x, y = torch.from_numpy(lines(axis)[name]).T
            want = torch.func.functional_call(one.loss.model, params, (x[:, None].float(),))
            torch.testing.assert_close(y.float(), want[:, 0].detach())


def test_image_predictions_show_the_predicted_classes_of_query_images(
    small_omniglot, figures, tmp_path
):
    one = build(dataclasses.replace(PRESETS["omniglot"], inner_steps=2, way=4, query=2))
    plots.image_predictions(one, "val", tmp_path / "x.png")
    axes = np.array(figures[0].axes).reshape(3, 2, 4)  # task, support or query, class
    batch = one.sources["val"].sample(0)
    phi = one.method.adapt(batch.support)
    colors = set()
    for task, (above, below) in enumerate(axes):
        assert [axis.get_title() for axis in above] == ["0", "1", "2", "3"]
        row = {name: tensor[task] for name, tensor in phi.items()}
        x, y = batch.query[0][task], batch.query[1][task]
        predicted = torch.func.functional_call(one.loss.model, row, (x,)).argmax(1)
        for number, axis in enumerate(below):
            at = y.tolist().index(number)
            assert axis.get_title() == str(predicted[at].item())
            assert axis.title.get_color() == ("green" if predicted[at] == number else "red")
            colors.add(axis.title.get_color())
            shown = torch.from_numpy(axis.get_images()[0].get_array())
            image = x[at, 0] - x[at].min()
            torch.testing.assert_close(shown.float(), image / image.max())
    assert colors == {"green", "red"}


@pytest.mark.renders
def test_a_saved_plot_is_a_png(tmp_path):
    figure, _ = plots.panels(1)
    path = plots.save(figure, tmp_path / "folder" / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")
