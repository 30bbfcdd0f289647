"""What a loss used in an evaluation, to detect changes before it is evaluated again."""

import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from imaml_ext.problem.captured import captured_modules, captured_names, captured_tensors
from imaml_ext.problem.unsupported import layer_name


class Usage(TorchFunctionMode):
    """The state of the data and of whatever else a loss uses, to detect changes.

    As a context it records the tensors, not vmapped, whose values operators receive, and the
    modules that are called.

    Attributes:
        recorded: whether an evaluation of the loss has been recorded.
    """

    def __init__(self, loss: Any, data: Any, shared: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.recorded = False
        self._loss, self._shared = loss, shared
        self._data = [(leaf, _state(leaf)) for leaf in pytree.tree_leaves(data)]
        self._modules: dict[int, tuple[nn.Module, bool]] = {}
        # Weak references: most are temporary, and could not change.
        self._tensors: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._variables: dict[tuple[str, int], None] = {}  # an ordered set

    def __enter__(self) -> Any:
        thread = threading.get_ident()

        def called(module: nn.Module, args: Any) -> None:
            kind: Any = type(module)
            if threading.get_ident() == thread and _reads_training(kind):
                self._modules[id(module)] = module, module.training

        self._hook = register_module_forward_pre_hook(called)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _WITHOUT_VALUES:
            for operand in (*args, *kwargs.values()):
                for each in operand if isinstance(operand, (list, tuple)) else (operand,):
                    if isinstance(each, Tensor):
                        self._record(each)
        return function(*args, **kwargs)

    def _record(self, tensor: Tensor) -> None:
        if _functorch.is_functorch_wrapped_tensor(tensor):
            return
        known = self._tensors.get(id(tensor))
        if known is not None and known[0]() is tensor:  # an id may be used again
            return
        self._tensors[id(tensor)] = weakref.ref(tensor), _state(tensor)

    def end(self) -> None:
        """End the recording, after an evaluation of the loss.

        Raises:
            ValueError: the loss has modified a tensor that it uses.
        """
        if self.recorded:
            return
        self.recorded = True
        for tensor in self._modified():
            raise ValueError(
                f"the loss modifies {self._name(tensor)} in place, so that each of its evaluations "
                "would differ: return the new value, or modify it outside of the loss"
            )
        for name, tensor in captured_tensors(self._loss):
            if id(tensor) in self._tensors:
                self._variables[name, id(tensor)] = None

    def check_unchanged(self) -> None:
        """Raises RuntimeError where data, tensors or training flags have changed."""
        for number, (leaf, state) in enumerate(self._data):
            if _state(leaf) != state:
                raise RuntimeError(_CHANGED.format(f"support (tensor {number})", "modified"))
        for module, training in self._modules.values():
            if module.training != training:
                now, then = ("train()", "eval()") if module.training else ("eval()", "train()")
                name = next((n for n, other in captured_modules(self._loss) if other is module), "")
                raise RuntimeError(
                    f"{layer_name(name, module)} was in {then} mode in adapt and is in {now} mode "
                    "in backward: differentiate in the same mode"
                )
        for tensor in self._modified():
            name = f"{self._name(tensor)}, which the loss uses,"
            raise RuntimeError(_CHANGED.format(name, "modified"))
        now_found = {(name, id(tensor)) for name, tensor in captured_tensors(self._loss)}
        for name, number in self._variables:
            if (name, number) not in now_found:
                raise RuntimeError(_CHANGED.format(f"{name}, which the loss uses,", "replaced"))

    def _modified(self) -> Iterator[Tensor]:
        for reference, state in self._tensors.values():
            tensor = reference()
            if tensor is not None and _state(tensor) != state:
                yield tensor

    def _name(self, tensor: Tensor) -> str:
        names = {id(t): f"shared[{name!r}]" for name, t in self._shared.items()}
        names |= captured_names(self._loss)
        return names.get(id(tensor), f"a tensor of shape {list(tensor.shape)}")


_CHANGED = (
    "{} was {} between adapt and backward, which would change the gradient: call backward "
    "before the change, or change a copy"
)

# Functions and attributes that do not depend on the values of a tensor.
_METHODS = ("size", "dim", "numel", "stride", "is_inference", "is_floating_point", "is_complex")
_ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "_version")
_WITHOUT_VALUES = {
    *(getattr(Tensor, name) for name in _METHODS),
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
}


@cache
def _reads_training(kind: type[nn.Module]) -> bool:
    """Whether a method of the class uses `self.training`."""
    methods = (
        getattr(value, "__code__", None)
        for each in kind.__mro__
        if each not in (nn.Module, object)
        for value in vars(each).values()
    )
    return any(code is not None and "training" in code.co_names for code in methods)


def _state(tensor: Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if tensor.layout is torch.strided else 0
