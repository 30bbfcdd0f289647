"""Runs CMakeLists.txt, the only build definition, for pip. Settings are environment variables:

IMAML_CUDA            auto (default), on or off; imaml_cuda.py selects nvcc
TORCH_CUDA_ARCH_LIST  as in "9.0" or "8.0;9.0+PTX"; default: all that nvcc supports
IMAML_TORCH_DIR       the torch package to build against
CMAKE_ARGS            additional arguments for CMake
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
MINIMUM_SETUPTOOLS = 77  # for the licence expression in pyproject.toml

if int(setuptools.__version__.partition(".")[0]) < MINIMUM_SETUPTOOLS:
    raise SystemExit(
        f"imaml_ext: a build without isolation needs: pip install "
        f"'setuptools>={MINIMUM_SETUPTOOLS}'; this is {setuptools.__version__}"
    )
sys.path.insert(0, str(SOURCE / "build_backend"))
from imaml_build import missing_tools, require_torch  # noqa: E402
from imaml_cuda import shortfall, tell  # noqa: E402
from imaml_readme import description  # noqa: E402


def cmake_architectures(arch_list: str) -> str:
    """Translate torch's notation to CMake's: '8.0;9.0+PTX' to '80-real;90'."""
    names = []
    for item in re.findall(r"[^;,\s]+", arch_list):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: cannot read {item!r}; expected a value like 9.0+PTX"
            )
        names.append(match[1] + match[2] + ("" if match[3] else "-real"))
    return ";".join(names)


def pybind11_directory() -> str:
    """The CMake folder of pybind11. Exits if pybind11, cmake or ninja is missing."""
    missing = missing_tools()
    try:
        import pybind11
    except ImportError:
        missing.append("pybind11")
    if missing:
        names = " ".join(f"'{name}'" for name in missing)
        raise SystemExit(f"imaml_ext: a build without isolation needs: pip install {names}")
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        pybind11 = pybind11_directory()
        torch = require_torch()
        cuda = os.environ.get("IMAML_CUDA", "auto")
        build = Path(self.build_temp).resolve()
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake", "-S", str(SOURCE), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DIMAML_TORCH_DIR={torch}",
            f"-DIMAML_CUDA={cuda}",
        ]  # fmt: skip
        if os.environ.get("TORCH_CUDA_ARCH_LIST") and cuda.lower() != "off":
            architectures = cmake_architectures(os.environ["TORCH_CUDA_ARCH_LIST"])
            configure.append(f"-DIMAML_CUDA_ARCHITECTURES={architectures}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        for command in (
            configure,
            ["cmake", "--build", str(build)],
            ["cmake", "--install", str(build), "--prefix", str(destination)],
        ):
            print("+", shlex.join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise SystemExit("imaml_ext: CMake failed; its output is above")
        if "IMAML_LACKS_NVCC:INTERNAL=ON" in (build / "CMakeCache.txt").read_text():
            tell(shortfall(torch))


setup(
    ext_modules=[Extension("imaml_ext._C", [])],
    cmdclass={"build_ext": CMakeBuild},
    long_description=description(SOURCE),
    long_description_content_type="text/markdown",
)
