"""examples/weight_decay.py at reduced size."""

from examples import load_example


def test_learned_strengths_beat_the_grid_on_unseen_problems(monkeypatch):
    example = load_example("weight_decay")
    monkeypatch.setattr(example, "FEATURES", 200)
    losses = example.main(["--small"])
    assert losses["learned"] < 0.75 * losses["grid"]
    assert losses["oracle"] < losses["learned"]
