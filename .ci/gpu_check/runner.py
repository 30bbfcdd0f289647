"""Stages one after the other, each under a time limit; what came of them is always on disk."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds from SIGINT, which lets a program write what it has, to SIGKILL
LOGGED = 400_000  # bytes that a command may leave in the log
REASON = 300  # characters


class Failed(Exception):
    """Why a stage, or a command of it, failed, in a line; `said` is all that the command said."""

    said = ""


class LeftOut(Exception):
    """Why a stage cannot be run here, where that is no failure."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is done under one name.

    Attributes:
        run: does it; raises `Failed` or `LeftOut`.
        need: seconds that it takes to be of use; where less is left it is left out.
        limit: seconds after which it is cut off.
    """

    name: str
    run: Callable[["Step"], None]
    need: float
    limit: float


class Step:
    """A stage being run: its commands, what it found, and what failed in it.

    Attributes:
        found: goes into the summary; each value is something that JSON can hold.
        failures: reasons, by what failed while the rest went on.
    """

    def __init__(self, log: Path, deadline: float) -> None:
        self._log = log
        self._deadline = deadline
        self.found: dict[str, Any] = {}
        self.failures: dict[str, str] = {}

    def left(self) -> float:
        """Seconds until the stage's limit."""
        return self._deadline - time.monotonic()

    def command(
        self,
        *argv: str | Path,
        cwd: Path,
        env: dict[str, str] | None = None,
        limit: float = float("inf"),
    ) -> str:
        """What a command says, which goes to the log too.

        Raises:
            Failed: it exits with an error, or is cut off.
        """
        words = [str(word) for word in argv]
        limit = min(limit, self.left())
        code, said = run_logged(words, self._log, limit, cwd, env or {})
        if code == 0:
            return said
        how = f"cut off after {limit:.0f} s" if code is None else f"exit code {code}"
        failure = Failed(f"{how}: {telling_line(said)}")
        failure.said = said
        raise failure

    def attempt(self, name: str, need: float, run: Callable[[], Any]) -> None:
        """A part whose failure does not stop the rest; not begun where `need` seconds are over."""
        if self.left() < need:
            self.found.setdefault("no time for", []).append(name)
            return
        try:
            run()
        except Failed as failure:
            self.failures[name] = str(failure)


def run_logged(
    argv: Sequence[str], log: Path, limit: float, cwd: Path, env: dict[str, str]
) -> tuple[int | None, str]:
    """Exit code, None if it was cut off, and output of a command; no process of it is left."""
    with log.open("ab") as file:
        file.write(f"\n+ {' '.join(argv)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            argv, cwd=cwd, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(timeout=max(limit, 0.0))
        except subprocess.TimeoutExpired:
            interrupt(process)
        finally:
            kill_group(process)
    return code, shortened(log, start)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed next
        process.wait(timeout=GRACE)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shortened(log: Path, start: int) -> str:
    """What the log holds from `start` on; if that is too much, its middle is taken out."""
    with log.open("r+b") as file:
        file.seek(start)
        said = file.read()
        if len(said) > LOGGED:
            middle = f"\n[{len(said) - LOGGED} bytes left out]\n".encode()
            said = said[: LOGGED // 2] + middle + said[-LOGGED // 2 :]
            file.seek(start)
            file.truncate()
            file.write(said)
    return said.decode(errors="replace")


# What tells most of a failure, and which line of its kind: the first of a compiler's complaints,
# the last exception.
TELLING = (
    (r"^=+ (Invalid|Uninitialized|Error|Barrier|Race)", 0),  # compute-sanitizer
    (r"(:\d+:|\(\d+\):).*\berror\b", 0),
    (r"^FAILED", 0),
    (r"^CMake Error", 0),
    (r"^[\w.]*(Error|Exception|Exit|Warning)\b", -1),
    (r"[Ee]rror|ERROR", -1),
    (r".", -1),
)


def telling_line(said: str) -> str:
    """The line of an output that tells most of why it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for pattern, which in TELLING:
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            return found[which][:REASON]
    return "nothing"


class Run:
    """The stages of one invocation, and their summary, written anew whenever one begins or ends.

    Args:
        out: folder of summary.json and log.txt.
        minutes: for all stages together.
        about: the head of the summary.
    """

    def __init__(self, out: Path, minutes: float, about: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.summary_file, self.log = out / "summary.json", out / "log.txt"
        self.log.write_text("")
        self._deadline = time.monotonic() + 60 * minutes
        self.summary: dict[str, Any] = {**about, "stages": []}

    def stage(self, stage: Stage) -> str:
        """Run it, if it fits; returns the outcome: passed, failed or left out."""
        left = self._deadline - time.monotonic()
        record: dict[str, Any] = {"name": stage.name, "outcome": "running", "reason": ""}
        self.summary["stages"].append(record)
        self._write()
        if left < stage.need:
            record["outcome"] = "left out"
            record["reason"] = f"{left:.0f} s are left, and it needs about {stage.need:.0f}"
            self._write()
            return record["outcome"]
        with self.log.open("a") as log:
            log.write(f"\n==== {stage.name}\n")
        start = time.monotonic()
        step = Step(self.log, start + min(stage.limit, left))
        try:
            stage.run(step)
            record["outcome"] = "failed" if step.failures else "passed"
            record["reason"] = "; ".join(f"{k}: {v}" for k, v in step.failures.items())
        except LeftOut as why:
            record |= {"outcome": "left out", "reason": str(why)}
        except Failed as why:
            record |= {"outcome": "failed", "reason": str(why)}
        except Exception as why:  # a mistake in the stage itself
            record |= {"outcome": "failed", "reason": f"{type(why).__name__}: {why}"[:REASON]}
        except KeyboardInterrupt:
            record |= {"outcome": "failed", "reason": "interrupted"}
            self._write()
            raise
        record |= {"seconds": round(time.monotonic() - start, 1), **step.found}
        if step.failures:
            record["failures"] = step.failures
        self._write()
        return record["outcome"]

    def _write(self) -> None:
        written = self.summary_file.with_suffix(".part")
        written.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")
        written.replace(self.summary_file)

    def table(self) -> str:
        """A line for each stage."""
        lines = []
        for record in self.summary["stages"]:
            seconds = f"{record.get('seconds', 0):.0f} s"
            line = f"{record['name']:9} {record['outcome']:9} {seconds:>6}  {record['reason']}"
            lines.append(line.rstrip())
        return "\n".join(lines)
