"""Which training labels are wrong? Weights of 500 examples, learned with 100 clean ones.

Digits (8x8 images), 40% of whose training labels were replaced by another class at random. The
model phi is multinomial logistic regression. It is fitted to the noisy examples, with weights that
minimise its loss on the clean ones:

    phi*(a, d) = argmin_phi  sum_j s(a_j) ce_j(phi) / sum_j s(a_j) + d/2 |phi|^2,  s = sigmoid
    min over a in R^500 and log d:  mean of ce(phi*(a, d)) over the clean examples

RESULT
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

from imaml_ext import LBFGS, ConjugateGradient, adapt

NOISE, CLEAN, FOLDS = 0.4, 100, 5
DECAYS = torch.logspace(-3, 0, 30)
theta = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}


def sample_run(seed: int, examples: int) -> dict[str, Tensor]:
    """Noisy training data, clean data and test data: a random split of all 1,797 images."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor((images - 5) / 16, dtype=torch.float32), torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, clean, test = order.tensor_split([examples, examples + CLEAN])
    wrong = torch.rand(examples, generator=generator) < NOISE
    labels = (y[train] + wrong * torch.randint(1, 10, (examples,), generator=generator)) % 10
    return {
        "x": x[train], "y": labels, "wrong": wrong, "clean_x": x[clean], "clean_y": y[clean],
        "test_x": x[test], "test_y": y[test],
    }  # fmt: skip


def loss(params, data):  # of one task: one run
    x, y, weight, decay = data
    each = cross_entropy(x @ params["weight"] + params["bias"], y, reduction="none")
    penalty = params["weight"].square().sum() + params["bias"].square().sum()
    return (weight * each).sum() / weight.sum() + decay / 2 * penalty


def fit(x, y, weight, decay):
    """The minimum of the loss of every run. The penalty is in the loss, so lam is 0."""
    inner, linear = LBFGS(steps=60, tol=1e-3), ConjugateGradient(max_iter=40, rtol=1e-2)
    return adapt(loss, theta, (x, y, weight, decay), lam=0, inner=inner, linear=linear)


def evaluate(params, x, y) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and accuracy of every run, [runs]."""
    logits = x @ params["weight"] + params["bias"][:, None]
    return cross_entropy(logits.mT, y, reduction="none").mean(1), (logits.argmax(2) == y).float().mean(1)


@torch.no_grad()
def best_decay(x, y, held_out_x, held_out_y, folds: int = 1) -> Tensor:
    """For every run, the decay with the smallest held-out loss, as a mean over its folds.

    Every decay is a task: all runs, folds and decays are solved together.
    """
    x, y, held_out_x, held_out_y = (
        t.repeat_interleave(len(DECAYS), 0) for t in (x, y, held_out_x, held_out_y)
    )
    params = fit(x, y, torch.ones(y.shape), DECAYS.repeat(len(y) // len(DECAYS)))
    losses = evaluate(params, held_out_x, held_out_y)[0]
    return DECAYS[losses.view(-1, folds, len(DECAYS)).mean(1).argmin(1)]


def folds_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The training and held-out parts of every fold, as tasks: [runs * FOLDS, ...] each."""
    parts = x.unflatten(1, (FOLDS, -1))
    held_out = [parts[:, k] for k in range(FOLDS)]
    training = [parts[:, [j for j in range(FOLDS) if j != k]].flatten(1, 2) for k in range(FOLDS)]
    return torch.stack(training, 1).flatten(0, 1), torch.stack(held_out, 1).flatten(0, 1)


def interval(values: Tensor) -> str:
    """Mean and 95% confidence interval over the runs (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std().item() / len(values) ** 0.5
    return f"{values.mean():.2f} ± {half:.2f}"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="outer steps")
    parser.add_argument("--figure", help="save the figure as this PNG file")
    parser.add_argument("--small", action="store_true", help="2 runs, few steps: some seconds")
    args = parser.parse_args(argv)
    runs, steps, examples = (2, 12, 300) if args.small else (args.runs, args.steps, 500)
    start = time.process_time()
    run = default_collate([sample_run(args.seed + k, examples) for k in range(runs)])
    x, y, clean, test = run["x"], run["y"], (run["clean_x"], run["clean_y"]), (run["test_x"], run["test_y"])

    # Uniform weights: one decay per run, chosen on the clean examples.
    decay = best_decay(x, y, *clean)
    uniform = evaluate(fit(x, y, torch.ones(y.shape), decay), *test)[1]

    # The clean examples alone: the decay is chosen by cross-validation, a fold being a task.
    (train_x, held_out_x), (train_y, held_out_y) = map(folds_of, clean)
    clean_decay = best_decay(train_x, train_y, held_out_x, held_out_y, FOLDS)
    alone = evaluate(fit(*clean, torch.ones(clean[1].shape), clean_decay), *test)[1]

    # Learned weights, with the decay of uniform ones.
    print(decay, clean_decay, uniform, alone, time.process_time() - start)
    logits = torch.zeros(y.shape, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for step in range(steps):
        optimizer.zero_grad()
        phi = fit(x, y, logits.sigmoid(), decay)
        clean_loss = evaluate(phi, *clean)[0]
        clean_loss.sum().backward()  # the runs do not interact
        optimizer.step()
        if step % 5 == 0:
            print(step, clean_loss.mean().item(), evaluate(phi, *test)[1].mean().item(), np.mean([roc_auc_score(~bad, row) for bad, row in zip(run["wrong"].numpy(), logits.detach().numpy())]), time.process_time() - start, flush=True)
    weights, wrong = logits.detach().sigmoid(), run["wrong"]
    learned = evaluate(fit(x, y, weights, decay), *test)[1]
    areas = torch.tensor([roc_auc_score(~w, row) for w, row in zip(wrong, weights, strict=True)])

    accuracies = {"uniform": uniform, "clean alone": alone, "learned": learned}
    for name, values in accuracies.items():
        print(f"{name:12s} test accuracy, %: {interval(100 * values)}")
    print(f"area under the ROC curve of the weights: {interval(areas)}")
    print(f"{time.process_time() - start:.0f} s of CPU time")
    if args.figure:
        plot(args.figure, weights, wrong, accuracies)
    return {name: values.mean().item() for name, values in accuracies.items()} | {
        "area": areas.mean().item()
    }


def plot(path: str, weights: Tensor, wrong: Tensor, accuracies: dict[str, Tensor]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, part, color in (("correct", ~wrong, "#0072b2"), ("wrong", wrong, "#d55e00")):
        left.hist(weights[part].numpy(), 25, (0, 1), alpha=0.7, color=color, label=f"{name} label")
    left.set(xlabel="learned weight", ylabel=f"training examples, {len(weights)} runs")
    left.legend()
    names = ["uniform\nweights", "clean examples\nalone", "learned\nweights"]
    values = [100 * v for v in accuracies.values()]
    half = [stats.t.ppf(0.975, len(v) - 1) * v.std().item() / len(v) ** 0.5 for v in values]
    colors = ["#999999", "#e69f00", "#0072b2"]
    bars = right.bar(names, [v.mean().item() for v in values], yerr=half, color=colors, capsize=5)
    right.bar_label(bars, fmt="%.1f", padding=6)
    right.set(ylabel="test accuracy, % (bars: 95% interval)", ylim=(50, 100))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
