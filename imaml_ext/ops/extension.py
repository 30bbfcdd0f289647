"""The compiled extension: loaded, described, and what its operators refuse."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imaml_ext._version import __version__


def _load() -> ModuleType:
    if hasattr(torch.ops.imaml, "row_dot"):
        raise ImportError(
            "imaml_ext: another copy of the extension is loaded in this process; import one only"
        )
    try:
        import imaml_ext._C as _C
    except ImportError as error:
        raise ImportError(
            f"imaml_ext: its C++ extension cannot be loaded ({error}). Build it against the torch "
            f"of this environment ({torch.__version__}; 2.10 or newer is needed) by running "
            "`pip install .` in the source folder, or `pip install -e .` to import the package "
            "from the source folder itself."
        ) from error
    built = _C.build_info()["version"]
    if built != __version__:
        raise ImportError(
            f"imaml_ext: the C++ extension is of version {built}, the Python files of "
            f"{__version__}. Reinstall: `pip install --force-reinstall --no-deps .`"
        )
    return _C


extension = _load()


def build_info() -> dict[str, str]:
    """How the extension was built.

    Returns:
        "version", "torch_headers", "torch_minimum", "compiler", "instruction_set", and "cuda" and
        "cuda_architectures", which are "" without CUDA.
    """
    return dict(extension.build_info())


WITHOUT_CUDA = (
    "imaml_ext was built without CUDA kernels: reinstall it with "
    "`pip install --force-reinstall --no-deps .` in its source folder, where torch has CUDA "
    "(IMAML_CUDA=on to insist)"
)


def _refuse_cuda() -> torch.library.Library:
    """Names the remedy wherever an operator without a CUDA kernel meets a CUDA tensor.

    The dispatcher's own message lists every backend that there is. The operators are those that
    are registered, so none can be forgotten. The result has to be kept: its end undoes this.
    """

    def refusal(operator: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> None:
            raise RuntimeError(f"{operator}: {WITHOUT_CUDA}")

        return refuse

    library = torch.library.Library("imaml", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        namespace, _, operator = name.partition("::")
        if namespace == "imaml":
            library.impl(operator, refusal(operator))
    return library


_refusing = None if build_info()["cuda"] else _refuse_cuda()


def fake(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what the operator gives without memory: in a compiled graph, and on "meta".

    One operand on "meta" is enough for the dispatcher to choose it, so the others are looked at.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            devices = {t.device for t in arguments if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(
                    f"{operator}: all tensors must be on one device, got "
                    f"{', '.join(sorted(map(str, devices)))}"
                )
            return function(*arguments)

        torch.library.register_fake(f"imaml::{operator}", checked)
        return function

    return register


def refuse_gradients(operator: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{operator}: not differentiable; call it under torch.no_grad() or detach its arguments"
        )
