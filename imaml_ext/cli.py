"""Command line: `imaml-ext train [DATASET]`, `eval CHECKPOINT` and `reproduce STUDY`."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from imaml_ext._checks import check_range
from imaml_ext._version import __version__
from imaml_ext.experiments import plots
from imaml_ext.experiments.build import build, percentages
from imaml_ext.experiments.cells import COLUMNS, ROWS, TABLES, VARIANTS
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.flags import SETTINGS, add_settings, flag, given_settings
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.reproduce import STUDIES
from imaml_ext.experiments.reproduce.study import Settings, measure, read
from imaml_ext.experiments.run import Interrupted, resumed_config, saved_config, train_to_end
from imaml_ext.ops.extension import WITHOUT_CUDA, build_info
from imaml_ext.training.checkpoint import evaluated_tensors, load_checkpoint, loading_from
from imaml_ext.training.distributed import Group, is_launched, own_device, process_group, rank
from imaml_ext.training.evaluation import Evaluation
from imaml_ext.training.optimisation import restore_tensors
from imaml_ext.training.trainer import NonfiniteError
from imaml_ext.training.weight_averaging import averaged

_EVAL_SETTINGS = [
    "method", "shot", "eval_query", "lam", "inner", "inner_lr", "inner_steps", "eval_proximal",
]  # fmt: skip
_ONLY_IN_TRAINING: dict[str, Any] = {
    "query_batches": 1, "query_scale": 1.0, "train_way": 0,
}  # fmt: skip
_EXAMPLES = """examples:
  imaml-ext train                                        sinusoid regression, half a minute
  imaml-ext train omniglot --data FOLDER --minutes 15    few-shot classification
  imaml-ext eval runs/omniglot-... --data FOLDER         the trained model, on unseen tasks
  imaml-ext reproduce fig2a                              a figure of the paper

imaml-ext COMMAND --help lists the options of a command."""
_RANGES = {
    "validations": "[1, inf)", "eval_tasks": "[1, inf)", "meta_steps": "[1, inf)",
    "save_every": "[0, inf)", "budget": "[0, inf)",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if is_launched() and options.run is not _train:
            raise ValueError("torchrun is supported for train only")
        for name, interval in _RANGES.items():
            if (value := vars(options).get(name)) is not None:
                check_range(flag(name), value, interval)
        options.run(options)
        sys.stdout.flush()
    except (ValueError, TypeError, OSError, NonfiniteError) as error:
        if isinstance(error, BrokenPipeError) and _lost_reader():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 1
        print(f"imaml-ext: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"imaml-ext: interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 128 + (interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT)
    return 0


def _lost_reader() -> bool:
    """Whether stdout is a pipe whose reader, such as `head`, has ended."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


class _CommandParser(argparse.ArgumentParser):
    """Suggests the nearest option for one that does not exist."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = args
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        for given in (text.partition("=")[0] for text in self._given if text.startswith("--")):
            if not any(flag.startswith(given) for flag in flags):
                message = f"there is no option {given}"
                names = [flag.lstrip("-") for flag in flags]  # the dashes would count as similar
                for near in difflib.get_close_matches(given[2:], names, n=1, cutoff=0.75):
                    message += f": did you mean --{near}?"
                break
        super().error(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default of an option, unless it is None or the option is a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imaml-ext", description="Meta-learning with implicit gradients.", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)

    train = commands.add_parser(
        "train", help="meta-train, then evaluate on unseen tasks", formatter_class=_Help,
        usage="%(prog)s [DATASET] [OPTIONS]",
    )  # fmt: skip
    train.set_defaults(run=_train)
    add = train.add_argument
    add("dataset", nargs="?", choices=list(PRESETS),
        help="data set (default: sinusoid, or that of the resumed run)")  # fmt: skip
    _add_common(train)
    add("--download", action="store_true", help="download the data set if it is missing")
    add("--out", type=Path, help="folder of the run (default: runs/DATASET-TIME)")
    add("--resume", action="store_true",
        help="resume from OUT/checkpoint.pt; under torchrun, start if it is missing")  # fmt: skip
    add("--compile", nargs="?", choices=("auto", "on", "off"), const="on", default="auto",
        help="run the losses' derivatives as recorded programs, on the CPU; "
        "auto: where they can be recorded, from meta-step 20 on")  # fmt: skip
    add("--validations", type=int, default=20, help="number of validations during the run")
    add("--save-every", type=float, default=60.0, metavar="SECONDS",
        help="time between checkpoints")  # fmt: skip
    add("--tensorboard", action="store_true", help="also log to OUT for TensorBoard, if installed")
    add_settings(train, SETTINGS, "the preset of the data set", with_presets=True)

    test = commands.add_parser(
        "eval", help="evaluate a checkpoint on unseen tasks", formatter_class=_Help,
        usage="%(prog)s CHECKPOINT [OPTIONS]",
    )  # fmt: skip
    test.set_defaults(run=_eval)
    test.add_argument("checkpoint", type=Path, help="checkpoint, or the folder of a run")
    test.add_argument("--split", choices=["val", "test"], default="test",
        help="validation or test tasks")  # fmt: skip
    _add_common(test)
    test.add_argument("--out", type=Path,
        help="folder of the plot (default: the run's, or runs/NAME for NAME.pt)")  # fmt: skip
    add_settings(test, _EVAL_SETTINGS, "as in training", with_presets=False)

    study = commands.add_parser(
        "reproduce", help="measure and draw a figure or table of the paper",
        formatter_class=_Help, usage="%(prog)s STUDY [OPTIONS]",
        epilog="; ".join(f"{name}: {study.question}" for name, study in STUDIES.items()),
    )  # fmt: skip
    study.set_defaults(run=_reproduce)
    add = study.add_argument
    add("study", choices=list(STUDIES), help="figure or table")
    _add_common(study)
    add("--out", type=Path, default=Path("runs/reproduce"),
        help="folder of the plots and of STUDY.jsonl, which grows")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the tasks and models")
    add("--meta-steps", type=int, help="meta-steps of each training (default: the study's)")
    add("--draw-only", action="store_true", help="draw from OUT/STUDY.jsonl without measuring")
    add = study.add_argument_group(f"cells of a table ({', '.join(TABLES)})").add_argument
    add("--cells", nargs="+", choices=sorted(COLUMNS), help="columns (default: all)")
    add("--methods", nargs="+", choices=list(ROWS), help="rows (default: all)")
    add("--variant", choices=VARIANTS, default="ours", help="which settings to use")
    add("--budget", "--minutes", type=float, default=0.0, metavar="MINUTES",
        help="training time of each cell, over all runs, not counting the learning of features, "
        "validation and testing; 0: no time limit")  # fmt: skip
    add("--runs", type=Path, default=Path("runs"), help="folder of the checkpoints")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="root folder of the data sets")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--json", action="store_true", help="print one JSON object as the last line")
    add("--eval-tasks", type=int, default=600, help="number of tasks in an evaluation")


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
        raise ValueError("torchrun needs --out, where restarted processes find the checkpoint")
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out, the folder of the run")
    device = _device(options)
    with process_group(device) as group:
        _train_in(group, device, options)


def _train_in(group: Group | None, device: torch.device, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    dataset = options.dataset or "sinusoid"
    out = options.out or Path("runs") / f"{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint = out / "checkpoint.pt"
    # torchrun repeats its command after a failure; the first time there is no checkpoint.
    resume = options.resume and (group is None or checkpoint.exists())
    if resume:
        given = {"dataset": options.dataset} if options.dataset else {}
        config = resumed_config(checkpoint, given | given_settings(options))
    elif checkpoint.exists():
        raise ValueError(f"{checkpoint} exists: resume it with --resume, or choose another --out")
    else:
        config = dataclasses.replace(PRESETS[dataset], **given_settings(options))
    torch.manual_seed(config.seed + rank(group))  # different dropout masks in each process
    experiment = build(config, data=options.data, device=device, download=options.download)
    trainer = experiment.trainer(compile=options.compile, process_group=group)
    train_to_end(
        experiment, trainer, checkpoint, resume=resume, validations=options.validations,
        save_every=options.save_every, with_tensorboard=options.tensorboard,
        plan=_plan(config, device, out),
        how_to_resume=f"repeat the command with --resume --out {out}",
    )  # fmt: skip
    if rank(group) > 0:
        return
    print(f"evaluating on {options.eval_tasks} unseen tasks", file=sys.stderr)
    with averaged(trainer.optimizer):
        result = experiment.evaluate("test", options.eval_tasks)
        written = plots.of_training(experiment, trainer, out)
    _report(options, result, start, steps=trainer.steps, checkpoint=checkpoint, written=written)


def _plan(config: Config, device: torch.device, out: Path) -> str:
    """What a training will do, and where."""
    tasks = config.dataset
    if config.dataset != "sinusoid":
        tasks = f"{config.way}-way {config.shot}-shot {tasks}"
    length = f"{config.meta_steps} meta-steps of {config.tasks} tasks"
    if config.minutes:
        length = f"at most {config.minutes:g} minutes or {length}"
    where = "the CPU, " + _count(torch.get_num_threads(), "thread")
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{config.method} on {tasks}: {length}, on {where}; results in {out}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _eval(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    checkpoint = options.checkpoint
    if checkpoint.is_dir():
        checkpoint /= "checkpoint.pt"
    state = load_checkpoint(checkpoint)
    saved = dataclasses.replace(saved_config(state, checkpoint), **_ONLY_IN_TRAINING)
    config = dataclasses.replace(saved, **given_settings(options))
    experiment = build(config, data=options.data, device=_device(options))
    with loading_from(checkpoint):
        method = experiment.method
        restore_tensors(method.learned() | method.buffers(), evaluated_tensors(state))
    is_run = checkpoint.name == "checkpoint.pt"
    out = options.out or (checkpoint.parent if is_run else Path("runs") / checkpoint.stem)
    out.mkdir(parents=True, exist_ok=True)  # raises before the evaluation
    result = experiment.evaluate(options.split, options.eval_tasks)
    written = [plots.of_tasks(experiment, options.split, out)]
    _report(options, result, start, steps=state["steps"], checkpoint=checkpoint, written=written)


def _report(
    options: argparse.Namespace, result: Evaluation, start: float, *, steps: int, checkpoint: Path,
    written: list[Path],
) -> None:  # fmt: skip
    """Print the figures, accuracies in percent. `start`: when the command started."""
    figures: dict[str, Any] = {}
    if "accuracy" in result.mean:
        figures |= percentages(result)
        print("accuracy  {accuracy:.2f} ± {ci95:.2f} % (95%)".format(**figures))
    if "support_accuracy" in figures:
        print("          {support_accuracy:.2f} ± {support_ci95:.2f} % with".format(**figures),
              "batch norm statistics of the support set alone")  # fmt: skip
    figures |= {"loss": result.mean["loss"], "loss_ci95": result.ci95["loss"]}
    print("loss      {loss:.4f} ± {loss_ci95:.4f} (95%)".format(**figures))
    print(f"on        {result.tasks} unseen tasks, after {steps} meta-steps")
    print(f"model     {checkpoint}")
    for path in written:
        print(f"plot      {path}")
    if options.json:
        figures |= {"tasks": result.tasks, "meta_steps": steps}
        figures |= {"seconds": round(time.perf_counter() - start, 1)}
        figures |= {"checkpoint": str(checkpoint), "plots": list(map(str, written))}
        finite = {k: v for k, v in figures.items() if not isinstance(v, float) or math.isfinite(v)}
        print(json.dumps(dict.fromkeys(figures) | finite))  # null: not finite


def _reproduce(options: argparse.Namespace) -> None:
    study, lines = STUDIES[options.study], options.out / f"{options.study}.jsonl"
    of_table = options.cells or options.methods or options.budget or options.variant != "ours"
    if of_table and options.study not in TABLES:
        raise ValueError(
            f"--cells, --methods, --variant and --budget apply to {', '.join(TABLES)}, "
            f"got {options.study}"
        )
    if not options.draw_only:
        given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
        measure(study, Settings(**given | {"device": _device(options)}), lines)
    records = read(study, lines)
    written = study.draw(records, options.out)
    figures = study.summary(records)
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {_short(v)}" for key, v in values.items()))
    if options.draw_only:
        print(f"drawn     from {lines}, nothing was measured")
    else:
        print(f"measured  {lines}")
    for path in written:
        print(f"written   {path}")
    if options.json:
        print(json.dumps(figures | {"measurements": str(lines), "plots": list(map(str, written))}))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
