"""Weights of 1,000 training examples, learned with 50 clean ones, find which labels are wrong.

Digits (8x8 images). For 40% of the training images the label is that of the next digit. The model
phi is multinomial logistic regression with weight decay d, fitted to the weighted noisy examples.
The weights minimise its loss on the clean examples, by 8 steps of Adam from uniform weights:
    phi*(a) = argmin_phi  sum_j s(a_j) ce_j(phi) / sum_j s(a_j) + d/2 |phi|^2,  s = sigmoid
    min over a in R^1000:  mean of ce(phi*(a)) over the clean examples

    uniform weights   67.1 ± 2.2%    test accuracy, mean and 95% interval of 10 runs
    clean alone       84.1 ± 2.0%    (decay by 5-fold cross-validation; 2 of 10 at the grid's end)
    learned weights   87.0 ± 2.0%    (area under their ROC curve for wrong labels: 84.5 ± 3.1%)
Paired differences: 19.9 ± 2.7% to uniform weights (which have the same d, the best for them on the
clean examples), 2.8 ± 1.9% to clean alone. The number of steps was chosen on seeds 0 to 4. There,
wrong labels drawn uniformly harm little: 92%, and learned weights gain 0.4%. `python
examples/noisy_labels.py`, seeds 20 to 29, 2026-11-28, 520b0f4, 65 s on a core, torch 2.13.0.
"""

import argparse
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from imaml_ext import LBFGS, ConjugateGradient, WarmStart, adapt

NOISE, CLEAN, FOLDS = 0.4, 50, 5
DECAYS = torch.logspace(-5, 1, 19)
theta = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}


def sample_run(seed: int, examples: int):
    """A random split of all 1,797 images: x, y and which y are wrong; clean and test data."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor((images - 5) / 16, dtype=torch.float32), torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, clean, test = order.tensor_split([examples, examples + CLEAN])
    wrong = torch.rand(examples, generator=generator) < NOISE
    labels = (y[train] + wrong) % 10
    return x[train], labels, wrong, (x[clean], y[clean]), (x[test], y[test])


def loss(params, data):  # of one task: one run
    x, y, weight = data
    each = cross_entropy(x @ params["weight"] + params["bias"], y, reduction="none")
    return (weight * each).sum() / weight.sum()


def fit(x, y, weight, decay, tol=2e-3, warm_start=None):
    """The minimum of every run, with a decay of every run, [runs]."""
    inner, linear = LBFGS(steps=300, tol=tol), ConjugateGradient(max_iter=200, rtol=1e-3)
    solvers = {"inner": inner, "linear": linear, "warm_start": warm_start}
    return adapt(loss, theta, (x, y, weight), lam=decay, **solvers)


def evaluate(params, x, y) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and accuracy of every run, [runs]."""
    logits = x @ params["weight"] + params["bias"][:, None]
    loss = cross_entropy(logits.mT, y, reduction="none").mean(1)
    return loss, (logits.argmax(2) == y).float().mean(1)


@torch.no_grad()
def best_decay(x, y, held_out_x, held_out_y, folds: int = 1) -> Tensor:
    """The decay of every run with the best held-out accuracy; every decay is a task."""
    data = (t.repeat_interleave(len(DECAYS), 0) for t in (x, y, held_out_x, held_out_y))
    x, y, held_out_x, held_out_y = data
    params = fit(x, y, torch.ones(y.shape), DECAYS.repeat(len(y) // len(DECAYS)))
    accuracy = evaluate(params, held_out_x, held_out_y)[1]
    return DECAYS[accuracy.view(-1, folds, len(DECAYS)).mean(1).argmax(1)]


def folds_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The training and held-out parts of every fold, as tasks: [runs * FOLDS, ...] each."""
    size = CLEAN // FOLDS
    rolled = torch.stack([x.roll(k * size, 1) for k in range(FOLDS)], 1).flatten(0, 1)
    return rolled[:, size:], rolled[:, :size]


def interval(values: Tensor) -> tuple[float, float]:
    """Mean over the runs and half the width of its 95% interval (Student's t)."""
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return values.mean().item(), quantile * values.std().item() / len(values) ** 0.5


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20, help="of the first run")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--figure", help="save the figure as this PNG file")
    parser.add_argument("--small", action="store_true", help="2 runs, few steps: some seconds")
    args = parser.parse_args(argv)
    runs, steps, examples = (2, 6, 200) if args.small else (args.runs, 8, 1000)
    splits = [sample_run(args.seed + k, examples) for k in range(runs)]  # every run is a task
    x, y, wrong, clean, test = default_collate(splits)
    decay = best_decay(x, y, *clean)  # with uniform weights
    uniform = evaluate(fit(x, y, torch.ones(y.shape), decay), *test)[1]
    # The clean examples alone: the decay is chosen by cross-validation, a fold being a task.
    (train_x, held_out_x), (train_y, held_out_y) = map(folds_of, clean)
    clean_decay = best_decay(train_x, train_y, held_out_x, held_out_y, FOLDS)
    alone = evaluate(fit(*clean, torch.ones(clean[1].shape), clean_decay), *test)[1]
    # Learned weights, with the decay of uniform weights
    logits = torch.zeros(y.shape, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    warm_start = WarmStart()  # the same fits in every step, with other weights
    for _ in range(steps):
        optimizer.zero_grad()
        params = fit(x, y, logits.sigmoid(), decay, 1e-4, warm_start)
        evaluate(params, *clean)[0].sum().backward()  # the runs do not interact
        optimizer.step()
    weights = logits.detach().sigmoid()
    learned = evaluate(fit(x, y, weights, decay), *test)[1]
    areas = torch.tensor([roc_auc_score(~w, row) for w, row in zip(wrong, weights, strict=True)])
    results = {"uniform": uniform, "clean alone": alone, "learned": learned, "area": areas}
    results |= {"learned - uniform": learned - uniform, "learned - alone": learned - alone}
    results = {name: interval(values) for name, values in results.items()}
    for name, (mean, half) in results.items():
        print(f"{name:17s} {100 * mean:.1f} ± {100 * half:.1f}%")
    print("decays:", *(d.tolist() for d in (decay, clean_decay)))
    print(f"{time.process_time():.0f} s of CPU time")
    if args.figure:
        plot(args.figure, weights, wrong, results)
    return {name: mean for name, (mean, _) in results.items()}


def plot(path: str, weights: Tensor, wrong: Tensor, results: dict[str, tuple]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    parts = ("correct label", ~wrong, "#0072b2"), ("wrong label", wrong, "#d55e00")
    for name, part, color in parts:
        left.hist(weights[part].numpy(), 25, range=(0, 1), alpha=0.7, color=color, label=name)
    left.set(xlabel="learned weight", ylabel=f"training examples, {len(weights)} runs")
    left.legend()
    means, halves = (100 * torch.tensor(list(results.values())[:3])).T.tolist()
    bars = right.bar(
        list(results)[:3], means, yerr=halves, color=["0.6", "#e69f00", "#0072b2"], capsize=5
    )
    right.bar_label(bars, fmt="%.1f", padding=6)
    right.set(ylabel="test accuracy, % (bars: 95% interval)", ylim=(50, 100))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
