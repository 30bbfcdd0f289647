"""Where .ci/gpu works: the sources, what is built from them, and where results go."""

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
    """What the stages share.

    Attributes:
        work: a folder that is kept: what is built there serves later invocations.
        out: of results; `output` gives the names.
        device: "cuda", or "cpu" in a rehearsal.
        commit: of the sources, as it is to stand beside figures.
    """

    work: Path
    out: Path
    device: str
    commit: str

    FILES = ("summary.json", "log.txt", "tests.xml", "bench.json", "table2.jsonl", "train.tar.gz")

    def output(self, name: str) -> Path:
        """A file of results: one of FILES, whatever stages are run."""
        if name not in self.FILES:
            raise ValueError(f"{name} is not one of {', '.join(self.FILES)}")
        return self.out / name

    @property
    def rehearse(self) -> bool:
        return self.device == "cpu"

    @property
    def site(self) -> Path:
        """The installed package, alone."""
        return self.work / "site"

    @property
    def environment(self) -> dict[str, str]:
        """In which Python imports what was installed, whatever else it has, and no sources."""
        return {"PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"}

    def installed(self) -> dict[str, str]:
        """The environment, of a package that was built from the sources as they are.

        Raises:
            Failed: there is none.
        """
        mark = self.site / ".built-from"
        if not mark.is_file():
            raise Failed("nothing is installed: run the stage build, too")
        if mark.read_text() != digest():
            raise Failed("the sources have changed since they were built: run the stage build, too")
        return self.environment

    def folder(self, name: str) -> Path:
        """A folder of this name to work in, as it was left."""
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def signed(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result with its commit, which an installed package cannot know."""
        if "source" in result:
            return result | {"source": self.signed(result["source"])}
        return result | {"commit": result["commit"] or self.commit}


def digest() -> str:
    """Of everything that is built or installed."""
    found = hashlib.sha256()
    for name in BUILT_FROM:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def current_commit() -> str:
    """Of the sources; "" where they are not in git."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


def last_json(said: str) -> dict[str, Any]:
    """The JSON object that a command printed as its last line."""
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


PYTHON = sys.executable
