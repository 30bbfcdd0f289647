"""Checks of a trainer's arguments."""

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from imaml_ext._checks import check_callable, check_instance
from imaml_ext.data.tasks import LoaderSource, TaskSource
from imaml_ext.methods.base import Method
from imaml_ext.training.budget import Budget
from imaml_ext.training.distributed import Group
from imaml_ext.training.evaluation import check_metrics
from imaml_ext.training.record import ENTRIES


def check(
    *,
    method: Any,
    metrics: Any,
    meta_gradient: Any,
    capture: Any,
    budget: Any,
    log: Any,
    process_group: Any,
) -> None:
    """Raises TypeError or ValueError for arguments of a `Trainer` that would fail in a step."""
    check_instance("method", method, Method, "pass one, such as IMAML(loss, params)")
    check_metrics("metrics", {} if metrics is None else metrics, "(params, query)", ENTRIES)
    if meta_gradient is not None:
        check_callable("meta_gradient", meta_gradient, "(batch)", "pass method.meta_gradient")
    if capture is not None:
        check_callable("capture", capture, "(function, warmup)")
    if budget is not None:
        check_instance("budget", budget, Budget, "pass Budget(steps)")
    if log is not None:
        check_callable("log", log, "(split, record)")
    if process_group is not None:
        check_instance("process_group", process_group, Group, "use torch.distributed")


def check_optimizer(method: Method, optimizer: Any, scheduler: Any) -> None:
    """Warns if the optimizer has tensors that get no gradient.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the optimizer lacks a tensor that the method learns, or the scheduler cannot be
            stepped with it.
    """
    over_all = "create it over method.learned().values()"
    check_instance("optimizer", optimizer, Optimizer, f"{over_all}, with groups for several rates")
    learned = method.learned()
    owned = {id(t): t for group in optimizer.param_groups for t in group["params"]}
    missing = [name for name, tensor in learned.items() if id(tensor) not in owned]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(
            f"optimizer lacks {len(missing)} of the {len(learned)} tensors that the method learns "
            f"({shown}): {over_all}; to keep a tensor constant, leave it out of the method"
        )
    ids = {id(tensor) for tensor in learned.values()}
    unused = [t for t in owned.values() if t.requires_grad and id(t) not in ids]
    if unused:
        warnings.warn(
            f"{len(unused)} of the {len(owned)} tensors of optimizer are not learned by the "
            f"method, such as one of shape {list(unused[0].shape)}: they get no gradient",
            stacklevel=3,
        )
    if scheduler is None:
        return
    check_instance("scheduler", scheduler, LRScheduler, "use torch.optim.lr_scheduler")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "scheduler must not be a ReduceLROnPlateau, whose step needs a value: call its "
            "step(value) after trainer.step()"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must be one of the trainer's optimizer: create and pass both")


def warn_unless_repeatable(source: TaskSource) -> None:
    """Warns, before training is resumed, if its batches are not functions of the step."""
    if isinstance(source, LoaderSource) and not source.repeatable:
        warnings.warn(
            "the position of the loader is not restored: training continues with its next "
            "batches; a source with sample(step) resumes exactly",
            stacklevel=3,
        )
