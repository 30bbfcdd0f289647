"""examples/weight_decay.py at reduced size."""

from examples import load_example


def test_learned_strengths_beat_the_grid_on_unseen_problems():
    losses = load_example("weight_decay").main(["--small"])
    assert losses["learned"] < 0.75 * losses["grid"]
    assert losses["oracle"] < losses["learned"]
