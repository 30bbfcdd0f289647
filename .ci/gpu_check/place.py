"""Folders of .ci/gpu: the sources, the build, and the results."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_check.runner import Failed

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILT_FROM = ("CMakeLists.txt", "setup.py", "pyproject.toml", "build_backend", "cmake", "csrc")
BUILT_FROM += ("imaml_ext",)


@dataclasses.dataclass(frozen=True)
class Place:
    """Settings that the stages share.

    Attributes:
        work: the build folder; later invocations reuse it.
        out: the folder of results; `output` gives their names.
        device: "cuda", or "cpu" in a rehearsal.
        commit: of the sources, to record with figures.
    """

    work: Path
    out: Path
    device: str
    commit: str

    FILES = ("summary.json", "log.txt", "tests.xml", "bench.json", "table2.jsonl", "train.tar.gz")

    def output(self, name: str) -> Path:
        """The path of a result; `name` is one of FILES."""
        if name not in self.FILES:
            raise ValueError(f"name must be one of {', '.join(self.FILES)}, got {name}")
        return self.out / name

    @property
    def rehearse(self) -> bool:
        return self.device == "cpu"

    @property
    def site(self) -> Path:
        """Where the package is installed, without dependencies."""
        return self.work / "site"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Python imports the installed package, not the sources."""
        return {"PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"}

    def installed(self) -> dict[str, str]:
        """`environment`, if the installed package was built from the current sources.

        Raises:
            Failed: if not.
        """
        mark = self.site / ".built-from"
        if not mark.is_file():
            raise Failed("nothing is installed: run the stage build first")
        if mark.read_text() != digest():
            raise Failed("the sources have changed since the build: run the stage build again")
        return self.environment

    def folder(self, name: str) -> Path:
        """A working folder of this name; its contents are kept."""
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def signed(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result with the commit, which an installed package cannot determine."""
        if "source" in result:
            return result | {"source": self.signed(result["source"])}
        return result | {"commit": result["commit"] or self.commit}


def digest() -> str:
    """A hash of everything that is built or installed."""
    found = hashlib.sha256()
    for name in BUILT_FROM:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def current_commit() -> str:
    """The sources' commit; "" if they are not in git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def last_json(output: str) -> dict[str, Any]:
    """The JSON object in the last line of a command's output."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


PYTHON = sys.executable
