"""Provenance of a measurement: command, commit, device, versions and date."""

import datetime
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from imaml_ext._version import __version__
from imaml_ext.ops.extension import build_info


def describe_run(device: torch.device) -> dict[str, Any]:
    """The provenance of what this process measures; the commit is "" outside of git."""
    command = Path(sys.argv[0]).name
    return {
        "command": " ".join([command, *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": build_info(),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                check=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return ""
        return run.stdout.strip()

    # An installed copy may lie inside another repository.
    if not git("ls-files", Path(__file__).name):
        return ""
    return git("describe", "--always", "--dirty", "--abbrev=12")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()
