"""Command line: `imaml-ext train [DATASET]`, `eval CHECKPOINT` and `reproduce STUDY`."""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imaml_ext._version import __version__
from imaml_ext.experiments import plots
from imaml_ext.experiments.build import build
from imaml_ext.experiments.cells import ROWS, TABLES, VARIANTS
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import CHOICES
from imaml_ext.experiments.reproduce import STUDIES
from imaml_ext.experiments.reproduce.study import Settings, read
from imaml_ext.experiments.reproduce.study import run as run_study
from imaml_ext.experiments.run import Interrupted, saved_config, train_to_end
from imaml_ext.ops.extension import WITHOUT_CUDA, build_info
from imaml_ext.training.checkpoint import load_checkpoint, restore
from imaml_ext.training.distributed import Group, is_launched, own_device, process_group, rank
from imaml_ext.training.evaluation import Evaluation, evaluate
from imaml_ext.training.trainer import NonfiniteError

_HELP = {
    "method": "meta-learning method",
    "way": "classes of a task",
    "shot": "support examples per class (or of a regression task)",
    "query": "query examples per class in training",
    "eval_query": "query examples per class in evaluation",
    "tasks": "tasks of one meta-step",
    "lam": "proximal strength",
    "inner_lr": "step size of the inner solver",
    "inner_steps": "steps of the inner solver",
    "cg_steps": "products of the linear solve of a meta-gradient",
    "damping": "added to the diagonal in the linear solve",
    "curvature": "hessian, or ggn: generalised Gauss-Newton",
    "inner": "inner solver of imaml",
    "linear": "linear solver of imaml",
    "last": "steps that truncated-maml differentiates",
    "eval_proximal": "keep the proximal term of imaml in evaluation",
    "learn_lam": "learn the proximal strength of imaml too, one or many",
    "learn_lr": "learn the step size of maml too",
    "meta_lr": "learning rate of the outer Adam",
    "meta_eps": "eps of the outer Adam",
    "nonfinite": "what a task that is not finite does: refuse: end the run; skip: leave it out",
    "decay": "of the learning rate: linear: to 2%% over the second half of the run",
    "meta_steps": "meta-steps in all",
    "minutes": "training time in all; the run ends there if it comes first; 0: meta-steps alone",
    "seed": "of the model's start and of the training tasks",
}


_OF_EVALUATION = (
    "method", "shot", "eval_query", "lam", "inner", "inner_lr", "inner_steps", "eval_proximal",
)  # fmt: skip


_OF_THE_RUN = ("meta_steps", "minutes", "nonfinite")  # may change when a run is resumed


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if is_launched() and options.run is not _train:
            raise ValueError("only train can be shared by the processes of torchrun")
        options.run(options)
    except (ValueError, TypeError, OSError, NonfiniteError) as error:
        print(f"imaml-ext: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"imaml-ext: interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 128 + (interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imaml-ext", description="Meta-learning with implicit gradients."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="meta-train, then evaluate on unseen tasks",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    train.set_defaults(run=_train)
    train.add_argument("dataset", nargs="?", choices=list(PRESETS), default="sinusoid")
    _add_common(train)
    _add_experiment(train, "experiment (default: the data set's preset)", list(_HELP))
    train.add_argument("--download", action="store_true", help="fetch the data if it is not there")
    train.add_argument("--out", type=Path, help="folder of the run; default runs/DATASET-TIME")
    train.add_argument(
        "--resume", action="store_true",
        help="go on from OUT/checkpoint.pt; under torchrun, if there is one",
    )  # fmt: skip
    train.add_argument(
        "--compile", action="store_true", help="the meta-gradient, once, on the CPU: takes a while"
    )
    train.add_argument("--validations", type=int, default=20, help="validations during the run")
    train.add_argument(
        "--save-every", type=float, default=60.0, metavar="SECONDS",
        help="of training, from one checkpoint to the next",
    )  # fmt: skip
    train.add_argument(
        "--tensorboard", action="store_true", help="log for it too, into OUT; needs the package"
    )

    test = commands.add_parser(
        "eval", help="evaluate a checkpoint on unseen tasks",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    test.set_defaults(run=_eval)
    test.add_argument("checkpoint", type=Path)
    test.add_argument("--split", choices=["val", "test"], default="test")
    _add_common(test)
    _add_experiment(test, "experiment (default: as it was trained)", _OF_EVALUATION)

    study = commands.add_parser(
        "reproduce", help="measure and draw a figure or table of the paper",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="; ".join(f"{name}: {study.question}" for name, study in STUDIES.items()),
    )  # fmt: skip
    study.set_defaults(run=_reproduce)
    study.add_argument("study", choices=list(STUDIES))
    _add_place(study)
    study.add_argument("--out", type=Path, default=Path("results"), help="folder of STUDY.jsonl")
    study.add_argument("--seed", type=int, default=0, help="of the tasks and the models")
    study.add_argument("--meta-steps", type=int, help="of each training, where there are any")
    study.add_argument(
        "--draw-only", action="store_true", help="draw what is in OUT/STUDY.jsonl again"
    )
    cells = study.add_argument_group(f"cells of a table ({', '.join(TABLES)})")
    columns = sorted({column for table in TABLES.values() for column in table.columns})
    cells.add_argument("--cells", nargs="+", choices=columns, help="columns; None: all")
    cells.add_argument("--methods", nargs="+", choices=list(ROWS), help="rows; None: all")
    cells.add_argument("--variant", choices=VARIANTS, default="ours", help="whose settings")
    cells.add_argument(
        "--budget", type=float, default=0.0, metavar="MINUTES",
        help="of training for each cell, over all runs of it; 0: as many meta-steps as it has",
    )  # fmt: skip
    cells.add_argument("--eval-tasks", type=int, default=600, help="tasks of each evaluation")
    cells.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_place(parser)
    parser.add_argument("--eval-tasks", type=int, default=600, help="tasks of the final evaluation")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data"), help="root of the data sets")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )


def _add_experiment(parser: argparse.ArgumentParser, heading: str, names: Sequence[str]) -> None:
    group = parser.add_argument_group(heading)
    for name in names:
        presets = ", ".join(f"{key}: {getattr(config, name)}" for key, config in PRESETS.items())
        kind = type(getattr(PRESETS["sinusoid"], name))
        as_given: dict[str, Any] = {"type": kind, "choices": CHOICES.get(name)}
        if kind is bool:
            as_given = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{_HELP[name]} ({presets})",
            **as_given,
        )


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The experiment's settings that were given on the command line."""
    given = vars(options)
    return {
        field.name: given[field.name]
        for field in dataclasses.fields(Config)
        if field.name in given and field.name != "dataset"
    }


def _device(options: argparse.Namespace) -> torch.device:
    has_kernels = bool(build_info()["cuda"])
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not has_kernels:
            name = "cpu"
            if not is_launched() or os.environ["RANK"] == "0":
                print(f"imaml-ext: the GPU is not used: {WITHOUT_CUDA}", file=sys.stderr)
    try:
        device = own_device(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not has_kernels:
        raise ValueError(f"--device cuda: {WITHOUT_CUDA}")
    return device


def _train(options: argparse.Namespace) -> None:
    if is_launched() and options.out is None:
        raise ValueError("torchrun needs --out: where restarted processes find the checkpoint")
    device = _device(options)
    with process_group(device) as group:
        _train_with(options, device, group)


def _train_with(options: argparse.Namespace, device: torch.device, group: Group | None) -> None:
    start = time.perf_counter()
    for name in ("validations", "eval_tasks"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
            )
    if not (math.isfinite(options.save_every) and options.save_every >= 0):
        raise ValueError(f"--save-every must be finite and not negative, got {options.save_every}")
    overrides = _overrides(options)
    out = options.out or Path("runs") / f"{options.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint = out / "checkpoint.pt"
    # torchrun repeats its command after a failure, and the first time there is nothing to resume.
    resume = options.resume and (group is None or checkpoint.exists())
    if resume:
        config = _resumed_config(checkpoint, options.dataset, overrides)
    else:
        if checkpoint.exists():
            raise ValueError(f"{checkpoint} exists: add --resume to go on, or choose another --out")
        config = dataclasses.replace(PRESETS[options.dataset], **overrides)
    torch.manual_seed(config.seed + rank(group))  # torch's own is another in each process
    experiment = build(config, data=options.data, device=device, download=options.download)
    try:
        trainer = experiment.trainer(compile=options.compile, process_group=group)
    except RuntimeError as error:
        if not options.compile:
            raise
        raise ValueError(f"--compile: {str(error).splitlines()[0]}") from error
    if resume:
        trainer.load(checkpoint)
        if rank(group) == 0:
            print(f"going on from meta-step {trainer.steps}", file=sys.stderr)
    train_to_end(
        experiment, trainer, checkpoint, validations=options.validations,
        save_every=options.save_every, with_tensorboard=options.tensorboard,
        resume=f"--resume --out {out}",
    )  # fmt: skip
    if rank(group) > 0:
        return

    result = evaluate(
        experiment.method,
        experiment.sources["test"],
        experiment.metrics,
        tasks=options.eval_tasks,
        support_metrics=experiment.support_metrics,
    )
    pictures = [
        plots.learning_curves(trainer.history, trainer.validation, out / "learning_curves.png")
    ]
    if config.dataset == "sinusoid":
        pictures.append(
            plots.sinusoid_fits(
                experiment.method, experiment.loss, experiment.sources["test"], out / "fits.png"
            )
        )
    _report(
        options, result, time.perf_counter() - start, meta_steps=trainer.steps,
        checkpoint=checkpoint, plots=pictures,
    )  # fmt: skip


def _resumed_config(path: Path, dataset: str, overrides: dict[str, Any]) -> Config:
    saved = saved_config(load_checkpoint(path), path)
    if saved.dataset != dataset:
        raise ValueError(f"{path} was trained on {saved.dataset}, not on {dataset}")
    for name, value in overrides.items():
        if name not in _OF_THE_RUN and getattr(saved, name) != value:
            allowed = ", ".join(f"--{other.replace('_', '-')}" for other in _OF_THE_RUN)
            raise ValueError(
                f"{path} was trained with {name}={getattr(saved, name)}, got {value}: "
                f"a resumed run keeps its settings, but for {allowed}"
            )
    return dataclasses.replace(saved, **overrides)


def _eval(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    state = load_checkpoint(options.checkpoint)
    config = dataclasses.replace(saved_config(state, options.checkpoint), **_overrides(options))
    experiment = build(config, data=options.data, device=_device(options))
    restore(experiment.method.learned(), state, options.checkpoint)
    result = evaluate(
        experiment.method,
        experiment.sources[options.split],
        experiment.metrics,
        tasks=options.eval_tasks,
        support_metrics=experiment.support_metrics,
    )
    _report(
        options, result, time.perf_counter() - start, meta_steps=state["steps"],
        checkpoint=options.checkpoint, plots=[],
    )  # fmt: skip


def _reproduce(options: argparse.Namespace) -> None:
    study = STUDIES[options.study]
    lines = options.out / f"{options.study}.jsonl"
    for name in ("meta_steps", "eval_tasks"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    of_table = options.cells or options.methods or options.budget or options.variant != "ours"
    if of_table and options.study not in TABLES:
        raise ValueError(
            f"--cells, --methods, --variant and --budget are of {', '.join(TABLES)}, "
            f"got {options.study}"
        )
    if not (math.isfinite(options.budget) and options.budget >= 0):
        raise ValueError(f"--budget must be finite and not negative, got {options.budget}")
    if not options.draw_only:
        settings = Settings(
            _device(options),
            options.data,
            options.seed,
            options.meta_steps,
            options.out,
            columns=options.cells,
            rows=options.methods,
            variant=options.variant,
            minutes=options.budget,
            tasks=options.eval_tasks,
            runs=options.runs,
        )
        run_study(study, settings, lines)
    records = read(study, lines)
    written = study.draw(records, options.out)
    figures = study.summary(records)
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {_short(v)}" for key, v in values.items()))
    print(f"measured  {lines}")
    for path in written:
        print(f"written   {path}")
    if options.json:
        print(json.dumps(figures | {"measurements": str(lines), "plots": list(map(str, written))}))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report(
    options: argparse.Namespace,
    result: Evaluation,
    seconds: float,
    *,
    meta_steps: int,
    checkpoint: Path,
    plots: list[Path],
) -> None:
    figures: dict[str, Any] = {}
    if "accuracy" in result.mean:
        figures["accuracy"] = 100 * result.mean["accuracy"]
        figures["ci95"] = 100 * result.ci95["accuracy"]
        print(f"accuracy  {figures['accuracy']:.2f} ± {figures['ci95']:.2f} % (95%)")
        figures["support_accuracy"] = 100 * result.mean["support_accuracy"]
        figures["support_ci95"] = 100 * result.ci95["support_accuracy"]
        print(
            f"          {figures['support_accuracy']:.2f} ± {figures['support_ci95']:.2f} % with "
            "batch norm's statistics of the support set alone"
        )
    figures["loss"] = result.mean["loss"]
    figures["loss_ci95"] = result.ci95["loss"]
    print(f"loss      {figures['loss']:.4f} ± {figures['loss_ci95']:.4f} (95%)")
    print(f"on        {result.tasks} unseen tasks, after {meta_steps} meta-steps")
    print(f"model     {checkpoint}")
    for picture in plots:
        print(f"drawn     {picture}")
    if options.json:
        figures |= {
            "tasks": result.tasks,
            "meta_steps": meta_steps,
            "seconds": round(seconds, 1),
            "checkpoint": str(checkpoint),
            "plots": [str(picture) for picture in plots],
        }
        print(json.dumps({k: None if _is_nan(v) else v for k, v in figures.items()}))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


if __name__ == "__main__":
    sys.exit(main())
