"""Few-shot Omniglot: features learned in 15 minutes on one core, and a convex head per task.

RESULT
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imaml_ext import ConjugateGradient, HessianFree, adapt
from imaml_ext.data import ImageEpisodes, load_omniglot

PUBLISHED = {5: 99.50, 20: 96.18}  # iMAML with Hessian-free inner steps, 1-shot, in percent
WAYS = (5, 20)  # in evaluation
LR = 4e-3


def outputs(head: dict[str, Tensor], features: Tensor) -> Tensor:
    return features @ head["weight"] + head["bias"]


def ridge(head: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """The support loss of one task: features [N, d], labels [N]."""
    features, y = data
    z = outputs(head, features)
    return 0.5 * (z - nn.functional.one_hot(y, z.shape[-1])).square().sum()


class Learner(nn.Module):
    """All that is learned: the body, the initial head, lam, and the temperature s."""

    # Ridge regression is quadratic: one Newton step reaches its minimum.
    inner = HessianFree(steps=1, linear=ConjugateGradient(max_iter=60, rtol=1e-4), damping=0.0)
    linear = ConjugateGradient(max_iter=40, rtol=1e-3)

    def __init__(self, filters: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (fan_in, fan_out) in enumerate(pairwise((1, *filters))):
            last = number == len(filters) - 1  # from 28 to 14, 7, 3 and 2 pixels
            layers.append(nn.Conv2d(fan_in, fan_out, 3, 1 + last, padding=1, bias=False))
            layers += [nn.Identity() if last else nn.MaxPool2d(2), nn.BatchNorm2d(fan_out)]
            layers.append(nn.ReLU())
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.body.to(memory_format=torch.channels_last)  # 1.7 times as fast on a CPU
        self.weight = nn.Parameter(torch.zeros(4 * filters[-1], 1))  # the same for all classes
        self.bias = nn.Parameter(torch.zeros(1))
        self.log_lam = nn.Parameter(torch.tensor(0.1).log())
        self.log_s = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, support: tuple[Tensor, Tensor], query_x: Tensor, way: int) -> Tensor:
        """Logits of the query images, [B, N, way]."""
        x, y = support
        shots, size = y.shape[1], len(self.weight)
        images = torch.cat([x, query_x], 1).flatten(0, 1)  # one pass for all images of all tasks
        features = self.body(images.contiguous(memory_format=torch.channels_last))
        features = features.view(len(x), -1, size) / math.sqrt(size)
        initial = {"weight": self.weight.expand(-1, way), "bias": self.bias.expand(way)}
        head = adapt(
            ridge, initial, (features[:, :shots], y),
            lam=self.log_lam.exp(), inner=self.inner, linear=self.linear,
        )  # fmt: skip
        return self.log_s.exp() * torch.func.vmap(outputs)(head, features[:, shots:])


@torch.no_grad()
def accuracies(learner: nn.Module, images: Tensor, way: int, tasks: int, seed: int) -> Tensor:
    """In percent, of each task; batch norm uses its running statistics."""
    source = ImageEpisodes(images, way=way, shot=1, query=5, tasks=10, seed=seed)
    learner.eval()
    of_tasks: list[Tensor] = []
    while len(of_tasks) * source.tasks < tasks:
        batch = source.sample(len(of_tasks))
        x, y = batch.query
        right = learner(batch.support, x, way).argmax(-1) == y
        of_tasks.append(100 * right.double().mean(1))
    return torch.cat(of_tasks)[:tasks]


def train(
    images: dict[str, Tensor],
    seed: int,
    minutes: float,
    filters: Sequence[int],
    way: int,
    tasks: int,
) -> tuple[nn.Module, list[list[float]]]:
    """The learner with averaged weights, and its accuracies on validation characters."""
    torch.manual_seed(seed)
    learner = Learner(filters)
    average = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    source = ImageEpisodes(
        images["train"], way=way, shot=1, query=3, tasks=1, seed=seed, rotate=True
    )
    optimizer = torch.optim.Adam(learner.parameters())
    curve: list[list[float]] = []
    step, spent = 0, 0.0  # minutes of CPU time, without those of the evaluation
    while spent < minutes:
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * spent / minutes)) / 2
        batch = source.sample(step)
        x, y = batch.query
        learner.train()
        logits = learner(batch.support, x, way)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(learner)
        step, spent = step + 1, spent + (time.process_time() - start) / 60
        if spent >= min(len(curve) + 1, minutes):
            means = [accuracies(average, images["val"], w, tasks, 101).mean().item() for w in WAYS]
            curve.append([spent, *means])
            print(f"{spent:.1f} minutes, {step} steps, loss {loss.item():.3f}, validation:", *means)
    return average, curve


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """The learning curves of all seeds."""
    figure = Figure(figsize=(7, 4.2))
    axis = figure.subplots()
    for number, (way, colour) in enumerate(zip(WAYS, ("#0072B2", "#D55E00"), strict=True)):
        for run in runs:
            minutes, *means = zip(*run["curve"], strict=True)
            label = f"{way}-way, validation characters" if run is runs[0] else None
            axis.plot(minutes, means[number], ".-", color=colour, lw=1, label=label)
        label = f"{way}-way, iMAML as published"
        axis.axhline(PUBLISHED[way], color=colour, ls="--", lw=1, label=label)
    axis.set(xlabel="minutes of one core", ylabel="1-shot accuracy (%)")
    axis.set_title(f"Omniglot, a ridge head on learned features: {len(runs)} seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that has omniglot-py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15.0, help="CPU time of the training")
    parser.add_argument("--runs", type=Path, help="folder for the results and weights of each seed")
    parser.add_argument("--figure", type=Path, help="PNG of the results in the folder")
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args(argv)
    images = load_omniglot(chosen.data).split()  # characters: 1100 train, 100 val, 423 test
    tasks, settings = 600, (chosen.minutes, (32, 64, 96, 128), 80, 200)
    if chosen.small:
        tasks, settings = 20, (0.03, (8, 8, 8, 8), 20, 20)
    wall = time.perf_counter()
    learner, curve = train(images, chosen.seed, *settings)
    result = {"wall minutes": (time.perf_counter() - wall) / 60}
    for way in WAYS:
        of_tasks = accuracies(learner, images["test"], way, tasks, seed=102)
        result[f"{way}-way"] = of_tasks.mean().item()
        result[f"{way}-way ci95"] = 1.96 * of_tasks.std(correction=0).item() / math.sqrt(tasks)
    print(result)
    if chosen.runs is not None:
        chosen.runs.mkdir(parents=True, exist_ok=True)
        torch.save(learner.state_dict(), chosen.runs / f"seed{chosen.seed}.pt")
        saved = json.dumps({"curve": curve, "test": result})
        (chosen.runs / f"seed{chosen.seed}.json").write_text(saved)
    if chosen.figure is not None:
        runs = [json.loads(path.read_text()) for path in sorted(chosen.runs.glob("seed*.json"))]
        draw(runs, chosen.figure)
    return result


if __name__ == "__main__":
    main()
