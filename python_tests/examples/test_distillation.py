import pytest

from examples import load_example

pytest.importorskip("sklearn")


def test_ten_distilled_images_train_a_better_classifier_than_the_class_means():
    found = load_example("distillation").main(["--small"])
    assert found["ten learned images"] > found["ten class means"] + 2
    assert found["ten class means"] > found["best of 100 choices"]
