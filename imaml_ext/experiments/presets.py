"""The default settings for each data set."""

from dataclasses import replace

from imaml_ext.experiments.cells import cell
from imaml_ext.experiments.config import Config

PRESETS = {
    "sinusoid": Config(
        dataset="sinusoid",
        way=1,
        shot=10,
        query=10,
        eval_query=100,
        tasks=25,
        lam=0.1,
        inner_lr=0.01,
        inner_steps=10,
        curvature="ggn",
        meta_steps=3000,
    ),
    "omniglot": Config(
        dataset="omniglot",
        query=5,
        lam=0.3,
        inner_steps=8,
        cg_steps=3,
        meta_lr=2e-3,
        meta_steps=1500,
    ),
    "mini-imagenet": replace(cell("table3", "5w1s", "imaml-gd").train, meta_steps=20_000),
    "tiny-imagenet": replace(cell("natural", "5w1s", "imaml-gd").train, meta_steps=3000),
}
