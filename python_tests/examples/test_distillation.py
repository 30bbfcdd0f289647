import pytest

from examples import load_example

pytest.importorskip("sklearn")


def test_ten_distilled_images_train_a_better_classifier_than_the_class_means(tmp_path):
    figure = tmp_path / "digits.png"
    found = load_example("distillation").main(["--small", "--figure", str(figure)])
    assert found["ten learned images"] > found["ten class means"] + 2
    assert found["ten class means"] > found["best of 100 choices"]
    assert figure.stat().st_size > 0
