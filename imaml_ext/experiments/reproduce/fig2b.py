"""Figure 2b: time and peak memory of a meta-gradient, against the number of inner steps.

Omniglot, 20-way 5-shot, the paper's network. Memory is the allocator's peak on CUDA. On the CPU it
is the growth of the resident set, in a new process for each point.
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
from imaml_ext.experiments.plots import label, panels, save
from imaml_ext.experiments.registry import omniglot_images
from imaml_ext.experiments.reproduce.memory import peak_bytes, release_free_memory, resident_bytes
from imaml_ext.experiments.reproduce.study import Record, Settings, Study
from imaml_ext.methods.base import Method
from imaml_ext.methods.imaml import IMAML
from imaml_ext.methods.maml import FOMAML, MAML
from imaml_ext.problem.module_loss import module_loss
from imaml_ext.solvers.inner import GradientDescent
from imaml_ext.solvers.linear.cg import ConjugateGradient

WAY, SHOT, TASKS, LAM, LR = 20, 5, 1, 2.0, 0.1
LABELS = {"maml": "MAML", "fomaml": "first-order MAML", "imaml": "iMAML"}
POINTS = [  # method, inner steps, CG steps; the last two show iMAML against CG steps
    *(
        (name, steps, 5 if name == "imaml" else 0)
        for steps in (1, 2, 4, 8, 16, 32)
        for name in LABELS
    ),
    ("imaml", 16, 1),
    ("imaml", 16, 20),
]


def measure(settings: Settings) -> Iterator[Record]:
    omniglot_images(settings.data)  # raises in this process if it is missing
    for method, inner_steps, cg_steps in POINTS:
        point = (method, inner_steps, cg_steps, settings)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            try:
                measured = process.submit(one_point, *point).result()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"{method} with {inner_steps} inner steps was killed, probably out of memory"
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
    """Seconds and bytes of the first meta-gradient of this process."""
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
        cg = ConjugateGradient(cg_steps, curvature="ggn")  # positive definite: never stops early
        method = IMAML(loss, params, lam=LAM, inner=inner, linear=cg)
    else:
        method = (MAML if name == "maml" else FOMAML)(loss, params, inner=inner)

    # Load the code, thread pools and workspaces that any method needs.
    FOMAML(loss, params, inner=GradientDescent(lr=LR, steps=1)).meta_gradient(batch)
    if device.type == "cuda":
        peak = peak_bytes(lambda: method.meta_gradient(batch), device)
    release_free_memory()  # otherwise the meta-gradient would reuse it
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    out = method.meta_gradient(batch)
    loss_value = out.query_loss.mean().item()  # waits for the device
    seconds = time.perf_counter() - start
    if device.type != "cuda":
        # getrusage's maximum would include that of the parent process.
        peak = resident_bytes("VmHWM") - before
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss_value}


def draw(records: list[Record], folder: Path) -> list[Path]:
    figure, axes = panels(3, width=5)

    def mebibytes(points: list[Record]) -> list[float]:
        return [point["peak_bytes"] / 2**20 for point in points]

    for method, name in LABELS.items():
        points = [r for r in records if r["method"] == method and r["cg_steps"] in (0, 5)]
        steps = [r["inner_steps"] for r in points]
        text = f"{name}, 5 CG steps" if method == "imaml" else name
        axes[0].plot(steps, mebibytes(points), "o-", label=text)
        axes[1].plot(steps, [r["seconds"] for r in points], "o-", label=text)
    points = [r for r in records if r["method"] == "imaml" and r["inner_steps"] == 16]
    points.sort(key=lambda record: record["cg_steps"])
    cg_steps = [r["cg_steps"] for r in points]
    axes[2].plot(cg_steps, mebibytes(points), "o-", label="iMAML, 16 inner steps")
    tasks = f"{WAY}-way {SHOT}-shot Omniglot, {records[0]['tasks']} task"
    label(axes[0], "inner gradient steps", "peak memory (MiB)", tasks)
    label(axes[1], "inner gradient steps", "seconds")
    label(axes[2], "CG steps", "peak memory (MiB)")
    for axis in axes:
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
    return [save(figure, folder / "fig2b.png")]


def summary(records: list[Record]) -> Record:
    return {
        f"{r['method']}, {r['inner_steps']} inner, {r['cg_steps']} CG steps": {
            "MiB": round(r["peak_bytes"] / 2**20, 1),
            "seconds": round(r["seconds"], 2),
        }
        for r in records
    }


STUDY = Study("how do time and memory grow with the inner steps?", measure, draw, summary)
