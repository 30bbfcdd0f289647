"""examples/noisy_labels.py at reduced size."""

import pytest

from examples import load_example

pytest.importorskip("sklearn")


def test_learned_weights_find_wrong_labels_and_raise_the_accuracy():
    results = load_example("noisy_labels").main(["--small"])
    assert results["area"] > 0.7
    assert results["learned"] > results["uniform"] + 0.02
