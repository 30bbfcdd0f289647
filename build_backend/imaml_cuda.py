"""Selects the nvcc for the build. The backend imports this module; CMake runs it:

    python imaml_cuda.py TORCH      # prints nvcc and its library folder, as a CMake list, or ""

Uses the first nvcc that can build a program, of

1. $CUDACXX, $CUDA_HOME, $CUDA_PATH;
2. PATH;
3. /usr/local/cuda, then /usr/local/cuda-*, newest first;
4. NVIDIA's compiler packages from PyPI, in the build environment or next to torch.

If there is none and torch was built for CUDA 13 or newer, these packages become a build
requirement, in the version of torch's CUDA; older packages contain no complete nvcc. They do not
with IMAML_CUDA=off, nor offline, where an unavailable requirement would fail the build, except
with IMAML_CUDA=on, since a local folder of wheels may contain them.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Names every part, for equal versions: ptxas cannot read the PTX of a newer nvvm.
PACKAGES = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={}.{}.*"
FIRST_WITH_PACKAGES = (13, 0)
TOOLKITS = Path("/usr/local")
PROGRAM = "__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); }\n"
TRUE = ("1", "true", "yes", "on", "t", "y")  # as pip and uv read variables


def torch_cuda(torch: Path) -> tuple[int, int] | None:
    """The CUDA version that torch was built for."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*= ['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def find_nvcc(torch: Path) -> Path | None:
    """The first nvcc that works, in the order above. Reports those that do not work on stderr."""
    for nvcc in dict.fromkeys(_candidates(torch)):
        fault = _fault(nvcc)
        if not fault:
            return nvcc
        print(f"imaml_ext: {nvcc} does not work: {fault}", file=sys.stderr, flush=True)
    return None


def _candidates(torch: Path) -> Iterator[Path]:
    if chosen := os.environ.get("CUDACXX"):
        yield Path(shutil.which(chosen) or chosen)
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    yield from (root / "bin" / "nvcc" for root in roots)
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield from TOOLKITS.glob("cuda/bin/nvcc")
    yield from sorted(TOOLKITS.glob("cuda-*/bin/nvcc"), reverse=True)
    for folder in [*map(Path, sys.path), torch.parent]:
        yield from folder.glob("nvidia/cu*/bin/nvcc")


def _fault(nvcc: Path) -> str:
    """The reason why nvcc cannot build a program the way CMake does; "" if it can."""
    flags = shlex.split(os.environ.get("CUDAFLAGS", ""))
    if host := os.environ.get("CUDAHOSTCXX"):
        flags += ["-ccbin", host]
    if libraries := library_folder(nvcc):
        flags.append(f"-L{libraries}")
    with tempfile.TemporaryDirectory(prefix="imaml-nvcc-") as folder:
        source = Path(folder) / "program.cu"
        source.write_text(PROGRAM, encoding="utf-8")
        command = [str(nvcc), *flags, "-o", str(source.with_suffix("")), str(source)]
        try:
            ran = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", timeout=120,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    output = ran.stdout.strip().splitlines() or [f"exit status {ran.returncode}"]
    return output[0] if ran.returncode else ""


def library_folder(nvcc: Path) -> Path | None:
    """The library folder that nvcc must be given: PyPI's is lib, while nvcc searches lib64."""
    root = nvcc.parent.parent
    has_libraries = (root / "lib" / "libcudart_static.a").is_file()
    return root / "lib" if has_libraries and not (root / "lib64").exists() else None


def compiler_packages(torch: Path) -> list[str]:
    """The build requirements that provide an nvcc, if there is none."""
    wanted, version = os.environ.get("IMAML_CUDA", "auto").lower(), torch_cuda(torch)
    if wanted == "off" or version is None or version < FIRST_WITH_PACKAGES or find_nvcc(torch):
        return []
    if wanted != "on" and offline():
        return []
    return [PACKAGES.format(*version)]


def offline() -> str:
    """The setting that makes the build offline; "" if it is online.

    Reads the frontend's environment variables, its command line (that of the parent process), and
    pip's configuration files, but not uv's, nor pip's requirements files.
    """
    for name in ("PIP_NO_INDEX", "UV_OFFLINE", "UV_NO_INDEX"):
        if os.environ.get(name, "").lower() in TRUE:
            return f"{name}={os.environ[name]}"
    command = _command_line(os.getppid())
    for word in command:
        if word == "--offline" or word.startswith("--no-ind"):  # pip accepts abbreviations
            return word
    is_uv = command and Path(command[0]).name.startswith("uv")
    return "" if is_uv or "PIP_NO_INDEX" in os.environ else _pip_configuration()


def _command_line(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _pip_configuration() -> str:
    # -E ignores PYTHONPATH, through which pip's isolation hides the environment's pip.
    command = [sys.executable, "-E", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = re.search(r"^\w+\.no-index='(\w+)'", listed.stdout, re.MULTILINE)
    return "no-index in pip's configuration" if found and found[1].lower() in TRUE else ""


def shortfall(torch: Path) -> str:
    """The warning of a build without CUDA kernels: the reason and the remedy, in one line."""
    version = torch_cuda(torch)
    line = "imaml_ext: built with CPU kernels only: "
    if version is None:
        return line + "there is no working nvcc"
    line += "torch has CUDA {}.{}, but there is no working nvcc".format(*version)
    remedy = "install the CUDA toolkit"
    if version >= FIRST_WITH_PACKAGES:
        if why := offline():
            line += f", and the build is offline ({why}), so none was installed"
        remedy = f"pip install '{PACKAGES.format(*version)}'"
    return f"{line}. For CUDA kernels: {remedy}, then pip install --force-reinstall --no-deps ."


def tell(line: str) -> None:
    """Print the line to stderr and to the controlling terminal, if there is one.

    pip and uv show the stderr of a build only with -v or if it fails.
    """
    print(line, file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        return
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            # pip's spinner has started a line, and uv redraws the last three.
            os.write(terminal, f"\n{line}\n\n\n".encode())
        finally:
            os.close(terminal)


if __name__ == "__main__":
    nvcc = find_nvcc(Path(sys.argv[1]))
    print("" if nvcc is None else f"{nvcc};{library_folder(nvcc) or ''}")
