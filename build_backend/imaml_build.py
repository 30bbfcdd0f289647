"""In-tree PEP 517 backend: setuptools, plus the search for a torch to build against.

The extension uses torch's stable ABI: compiled against the headers of any torch >= 2.10, it loads
in every torch >= 2.10. So `pip install .` uses the installed torch and downloads one only if there
is none. The search order:

1. $IMAML_TORCH_DIR;
2. the torch that this Python imports (no build isolation);
3. the environment that pip installs into: pip's isolation removes it from sys.path but does not
   change sys.prefix and sysconfig;
4. the environments on PATH, and ./.venv, because uv builds in a separate environment;
5. otherwise torch becomes a build requirement.

imaml_cuda.py does the same for nvcc.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imaml_cuda import compiler_packages
from setuptools import build_meta

MINIMUM_TORCH = (2, 10)
MINIMUM_CMAKE = (3, 22)
TORCH = "torch>={}.{}".format(*MINIMUM_TORCH)
EGG_INFO = "imaml_ext.egg-info"


def _fault(torch: Path) -> str:
    """The reason why the package cannot be built against; "" if it can."""
    try:
        text = (torch / "version.py").read_text(encoding="utf-8")
    except OSError:
        return "no torch package"
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    if found is None:
        return "a torch package without a version"
    if (int(found[2]), int(found[3])) < MINIMUM_TORCH:
        return f"torch {found[1]}, which is too old"
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        return f"torch {found[1]}, without its headers"
    return ""


def _site_packages() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent.parent
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    configuration = Path(sys.prefix) / "pyvenv.cfg"
    if not configuration.is_file() or "include-system-site-packages = true" in (
        configuration.read_text(encoding="utf-8").lower()
    ):
        yield from map(Path, site.getsitepackages([sys.base_prefix]))
        yield Path(site.getusersitepackages())
    on_path = os.environ.get("PATH", "").split(os.pathsep)
    environments = [*(Path(entry).parent for entry in on_path), Path.cwd() / ".venv"]
    for environment in environments:
        if (environment / "pyvenv.cfg").is_file() or (environment / "conda-meta").is_dir():
            yield from environment.glob("lib/python3*/site-packages")


def find_torch() -> Path | None:
    """The directory of the first usable torch package, in the search order above."""
    chosen = os.environ.get("IMAML_TORCH_DIR")
    if chosen:
        fault = _fault(Path(chosen))
        if fault:
            raise SystemExit(f"imaml_ext: IMAML_TORCH_DIR={chosen} is {fault}; {TORCH} is needed")
        return Path(chosen)
    return next((d / "torch" for d in _site_packages() if not _fault(d / "torch")), None)


def require_torch() -> Path:
    torch = find_torch()
    if torch is None:
        found = {str(d / "torch"): _fault(d / "torch") for d in _site_packages()}
        rejected = "".join(f"; {d} is {why}" for d, why in found.items() if Path(d).is_dir())
        raise SystemExit(f"imaml_ext: building needs {TORCH}: pip install '{TORCH}'{rejected}")
    return torch


def missing_tools() -> list[str]:
    """The build tools that must be installed before CMake can run."""
    missing = []
    if _version("cmake") < MINIMUM_CMAKE:
        missing.append("cmake>={}.{}".format(*MINIMUM_CMAKE))
    if _version("ninja") == (0, 0):
        missing.append("ninja")
    return missing


@contextlib.contextmanager
def _temporary_build_folders() -> Iterator[None]:
    """Keep build/ and *.egg-info, which would become stale, out of the source tree."""
    with tempfile.TemporaryDirectory(prefix="imaml-build-") as folder:
        configuration = Path(folder) / "extra.cfg"
        configuration.write_text(
            f"[build]\nbuild_base = {folder}/build\n"
            f"[bdist_wheel]\nbdist_dir = {folder}/bdist\n[egg_info]\negg_base = {folder}\n",
            encoding="utf-8",
        )
        os.environ["DIST_EXTRA_CONFIG"] = str(configuration)
        try:
            yield
        finally:
            del os.environ["DIST_EXTRA_CONFIG"]


def _version(tool: str) -> tuple[int, ...]:
    """(major, minor); (0, 0) if the tool does not run, like PyPI's cmake without its package."""
    try:
        output = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0, 0)
    found = re.search(r"(\d+)\.(\d+)", output)
    return tuple(map(int, found.groups())) if found else (0, 0)


def get_requires_for_build_wheel(config_settings=None):
    torch = find_torch()
    # The CUDA version of a torch that is yet to be installed is unknown.
    return [*missing_tools(), *([TORCH] if torch is None else compiler_packages(torch))]


def get_requires_for_build_sdist(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with _temporary_build_folders():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with _temporary_build_folders():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    """Package what MANIFEST.in lists; setuptools would add what an older egg-info lists."""
    shutil.rmtree(EGG_INFO, ignore_errors=True)
    try:
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        shutil.rmtree(EGG_INFO, ignore_errors=True)


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = build_meta.build_editable
