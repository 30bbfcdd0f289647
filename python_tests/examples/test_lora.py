"""LoRA adapters with learned initial values: the program at reduced size."""

import pytest

from examples import load_example


@pytest.mark.renders
def test_learned_adapters_adapt_better_than_fresh_ones_and_draw_the_figure(tmp_path):
    figure = tmp_path / "lora.png"
    mean = load_example("lora").main(["--small", "--figure", str(figure)])
    unadapted, fresh, learned = (
        mean[f"{name}, loss"]
        for name in ("LoRA, B = 0, 0 steps", "LoRA, B = 0, 8 steps", "LoRA, learned, 8 steps")
    )
    assert mean["truth, loss"] < learned
    # It is 0.06 below; 0.01 below with a zero meta-gradient, 0.06 above with -1 times it.
    assert learned < fresh - 0.035
    assert learned < unadapted - 0.2
    assert figure.stat().st_size > 5000
