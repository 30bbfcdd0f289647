"""What an optimizer's step changes: a state to save, to restore, and to fall back to."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from imaml_ext.methods.base import Method
from imaml_ext.training.weight_averaging import averages, decays


@dataclass(frozen=True)
class Optimisation:
    """An optimizer's step, and what it changes: the learned tensors and the state of both.

    The state of torch's random number generators, which the closure may use, counts as changed too.
    """

    method: Method
    optimizer: Optimizer
    scheduler: LRScheduler | None

    def step(self, closure: Callable[[], float]) -> None:
        """Make the optimizer's step. If the closure raises an exception, nothing has changed."""
        parameter = inspect.signature(self.optimizer.step).parameters.get("closure")
        # One that requires a closure, as L-BFGS does, moves the parameters between its calls.
        moves = parameter is not None and parameter.default is inspect.Parameter.empty
        with self._undone_on_error() if moves else nullcontext():
            self.optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The state, as in a checkpoint; refers to the tensors."""
        random = {"cpu": torch.get_rng_state()}
        if self.method.layout.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        learned, kept = self.method.learned(), averages(self.optimizer)
        return {
            "learned": {name: tensor.detach() for name, tensor in learned.items()},
            "averages": {name: kept[t] for name, t in learned.items() if t in kept},
            "buffers": self.method.buffers(),
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "random": random,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo what has changed since `state_dict` returned `state`.

        Raises:
            Exception: the state belongs to other tensors, or to another optimizer or scheduler.
                Nothing has changed.
        """
        expected = self.state_dict()
        if state["optimizer_class"] != expected["optimizer_class"]:
            raise ValueError(
                f"the checkpoint was written with {state['optimizer_class']}, "
                f"but the optimizer is {expected['optimizer_class']}"
            )
        if state["scheduler"].keys() != expected["scheduler"].keys():
            raise ValueError("the checkpoint was written with another scheduler, or without one")
        saved, own = (decays(s["optimizer"]["param_groups"]) for s in (state, expected))
        if saved != own:
            raise ValueError(
                f"the checkpoint was written with the average_decay {saved}, but the optimizer has "
                f"{own}: call average_weights with the same decay before loading"
            )
        with self._undone_on_error():
            self._load(state)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """If the body raises an exception, restore the state from before it."""
        before = copy.deepcopy(self.state_dict())
        try:
            yield
        except Exception:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        restore_tensors(self.method.learned(), state["learned"])
        restore_tensors(self.method.buffers(), state.get("buffers", {}))
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"]["cuda"])
        saved = copy.copy(state["optimizer"])
        saved["param_groups"] = [dict(group) for group in saved["param_groups"]]
        for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=False):
            if "capturable" in own:  # depends on the device, which may differ from that when saved
                group["capturable"] = own["capturable"]
        self.optimizer.load_state_dict(saved)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def restore_tensors(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy the saved tensors into those of the same names.

    Raises:
        ValueError: names, shapes or dtypes differ; nothing is written.
    """
    expected, got = _formats(tensors), _formats(saved)
    if got != expected:
        differing = [n for n in expected | got if got.get(n) != expected.get(n)]
        first = differing[0]
        raise ValueError(
            f"the checkpoint belongs to another model: {len(differing)} tensors differ, such as "
            f"{first!r}: got {got.get(first)}, expected {expected.get(first)}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def _formats(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
