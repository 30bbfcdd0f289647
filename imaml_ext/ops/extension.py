"""Loads the compiled extension."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imaml_ext._version import __version__


def _load() -> ModuleType:
    if hasattr(torch.ops.imaml, "row_dot"):
        raise ImportError(
            "imaml_ext: another copy of the extension is loaded in this process; import only one"
        )
    try:
        import imaml_ext._C as _C
    except ImportError as error:
        folder = Path(__file__).parents[2]
        if isinstance(error, ModuleNotFoundError) and (folder / "setup.py").exists():
            raise ImportError(
                f"imaml_ext: Python imports the sources in {folder}, where the C++ extension is "
                "not built: start it in another folder to import the installed package, or build "
                "in place with `pip install -e .`"
            ) from error
        raise ImportError(
            f"imaml_ext: cannot load the C++ extension ({error}). Build it against the torch of "
            f"this environment ({torch.__version__}; 2.10 or newer is required): run "
            "`pip install .` in the source folder."
        ) from error
    built = _C.build_info()["version"]
    if built != __version__:
        raise ImportError(
            f"imaml_ext: the C++ extension has version {built}, the Python files {__version__}. "
            "Reinstall: `pip install --force-reinstall --no-deps .`"
        )
    return _C


extension = _load()


def build_info() -> dict[str, str]:
    """How the extension was built.

    Returns:
        A dict with keys "version", "torch_headers", "torch_minimum", "compiler" and
        "instruction_set", and "cuda" and "cuda_architectures", "" in a build without CUDA.
    """
    return dict(extension.build_info())


WITHOUT_CUDA = (
    "imaml_ext was built without CUDA kernels: reinstall it with "
    "`pip install --force-reinstall --no-deps .` in its source folder and an environment whose "
    "torch has CUDA (set IMAML_CUDA=on to require them)"
)


def _refuse_cuda() -> torch.library.Library:
    """Makes every operator raise `WITHOUT_CUDA` on CUDA tensors, while the result is alive.

    The dispatcher's own message lists all backends and no remedy.
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
    """Registers the fake kernel of an operator, for tracing and for meta tensors.

    It also runs if only some of the operands are meta tensors, which it refuses.
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
