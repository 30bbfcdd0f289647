"""Figure 2b: time and peak memory of a meta-gradient, against the number of inner steps.

Omniglot, 20-way 5-shot, the paper's network. On CUDA memory is the allocator's peak. On the CPU it
is how much the resident set grows in a fresh process for each point.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from imaml_ext.data import ImageEpisodes, load_omniglot
from imaml_ext.experiments.models import conv4
from imaml_ext.experiments.plots import pyplot, save
from imaml_ext.experiments.reproduce.memory import peak_bytes, release_free_memory, resident_bytes
from imaml_ext.experiments.reproduce.study import Record, Settings, Study
from imaml_ext.methods.base import Method
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.maml import FOMAML, MAML
from imaml_ext.problem.module_loss import module_loss
from imaml_ext.solvers.inner import GradientDescent
from imaml_ext.solvers.linear.cg import ConjugateGradient

WAY, SHOT, TASKS, LAM, LR = 20, 5, 1, 2.0, 0.1
INNER_STEPS = (1, 2, 4, 8, 16, 32)
CG_STEPS = (1, 5, 20)
LABELS = {"maml": "MAML", "fomaml": "first-order MAML", "imaml": "iMAML"}


def points() -> Iterator[tuple[str, int, int]]:
    """(method, inner steps, CG steps): over the inner steps, and for iMAML over the CG steps."""
    for steps in INNER_STEPS:
        yield from (("maml", steps, 0), ("fomaml", steps, 0), ("imaml", steps, 5))
    for cg_steps in CG_STEPS:
        if cg_steps != 5:
            yield "imaml", 16, cg_steps


def measure(settings: Settings) -> Iterator[Record]:
    load_omniglot(settings.data)  # says now if it is not there
    for method, inner_steps, cg_steps in points():
        point = (method, inner_steps, cg_steps, settings)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            try:
                measured = fresh.submit(one_point, *point).result()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"the process of {method} with {inner_steps} steps was killed: out of memory?"
                ) from error
        yield {
            "method": method,
            "inner_steps": inner_steps,
            "cg_steps": cg_steps,
            "way": WAY,
            "shot": SHOT,
            "tasks": TASKS,
            **measured,
        }


def one_point(name: str, inner_steps: int, cg_steps: int, settings: Settings) -> Record:
    """Seconds and bytes of one meta-gradient, in this process, which has made none before."""
    device = settings.device
    torch.manual_seed(settings.seed)
    images = load_omniglot(settings.data).to(device).split()["train"]
    batch = ImageEpisodes(
        images, way=WAY, shot=SHOT, query=SHOT, tasks=TASKS, seed=settings.seed
    ).sample(0)
    model = conv4(WAY).to(device)
    loss, params = module_loss(model, nn.functional.cross_entropy), dict(model.named_parameters())
    inner = GradientDescent(lr=LR, steps=inner_steps)
    method: Method
    if name == "imaml":
        cg = ConjugateGradient(cg_steps, curvature="ggn")  # never stops early
        method = IMAML(loss, params, lam=LAM, inner=inner, linear=cg)
    else:
        method = (MAML if name == "maml" else FOMAML)(loss, params, inner=inner)

    # Code, thread pools and workspaces that any method needs are loaded before.
    FOMAML(loss, params, inner=GradientDescent(lr=LR, steps=1)).meta_gradient(batch)
    if device.type == "cuda":
        peak = peak_bytes(lambda: method.meta_gradient(batch), device)
    release_free_memory()  # what the loading left free is not to be used again
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    out = method.meta_gradient(batch)
    loss_value = out.query_loss.mean().item()  # and waits for the device
    seconds = time.perf_counter() - start
    if device.type != "cuda":
        # Not getrusage's maximum, which begins with that of the process that started this one.
        peak = resident_bytes("VmHWM") - before
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss_value}


def draw(records: list[Record], folder: Path) -> list[Path]:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for name, label in LABELS.items():
        mine = [r for r in records if r["method"] == name and r["cg_steps"] in (0, 5)]
        steps = [r["inner_steps"] for r in mine]
        text = f"{label}, 5 CG steps" if name == "imaml" else label
        axes[0].plot(steps, [r["peak_bytes"] / 2**20 for r in mine], "o-", label=text)
        axes[1].plot(steps, [r["seconds"] for r in mine], "o-", label=text)
    mine = [r for r in records if r["method"] == "imaml" and r["inner_steps"] == 16]
    mine.sort(key=lambda record: record["cg_steps"])
    cg_steps = [r["cg_steps"] for r in mine]
    axes[2].plot(cg_steps, [r["peak_bytes"] / 2**20 for r in mine], "o-", label="iMAML, 16 steps")
    for axis, x, y in zip(
        axes,
        ("inner gradient steps", "inner gradient steps", "CG steps"),
        ("peak memory (MiB)", "seconds", "peak memory (MiB)"),
        strict=True,
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_title(f"{WAY}-way {SHOT}-shot Omniglot, {records[0]['tasks']} task")
    return [save(figure, folder / "fig2b.png")]


def summary(records: list[Record]) -> Record:
    return {
        f"{r['method']}, {r['inner_steps']} inner, {r['cg_steps']} CG steps": {
            "MiB": round(r["peak_bytes"] / 2**20, 1),
            "seconds": round(r["seconds"], 2),
        }
        for r in records
    }


STUDY = Study("what do time and memory do as the inner steps grow?", measure, draw, summary)
