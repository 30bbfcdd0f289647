"""Runs stages in turn, each with a time limit, and keeps a summary on disk up to date."""

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

GRACE = 15.0  # seconds from SIGINT, after which a program can save its results, to SIGKILL
LOGGED = 400_000  # bytes of a command's output that the log keeps
REASON = 300  # characters


class Failed(Exception):
    """Why a stage or a command failed, in one line; `output` is that of the command."""

    output = ""


class LeftOut(Exception):
    """Why a stage cannot run on this machine; not a failure."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        run: runs it; may raise `Failed` or `LeftOut`.
        need: seconds below which running it is useless; with less time left, it is left out.
        limit: seconds after which it is stopped.
    """

    name: str
    run: Callable[["Step"], None]
    need: float
    limit: float


class Step:
    """A running stage: runs commands, and collects results and failures.

    Attributes:
        found: results for the summary, as JSON values.
        failures: reasons, by the name of the part that failed.
    """

    def __init__(self, log: Path, deadline: float) -> None:
        self._log = log
        self._deadline = deadline
        self.found: dict[str, Any] = {}
        self.failures: dict[str, str] = {}

    def left(self) -> float:
        """Seconds until the stage's time limit."""
        return self._deadline - time.monotonic()

    def command(
        self,
        *argv: str | Path,
        cwd: Path,
        env: dict[str, str] | None = None,
        limit: float = float("inf"),
    ) -> str:
        """Run a command; its output is returned, and appended to the log.

        Raises:
            Failed: the command exits with an error, or runs out of time.
        """
        words = [str(word) for word in argv]
        limit = min(limit, self.left())
        code, output = run_logged(words, self._log, limit, cwd, env or {})
        if code == 0:
            return output
        how = f"stopped after {limit:.0f} s" if code is None else f"exit code {code}"
        failure = Failed(f"{how}: {telling_line(output)}")
        failure.output = output
        raise failure

    def attempt(self, name: str, need: float, run: Callable[[], Any]) -> None:
        """Run a part whose failure does not stop the stage, if `need` seconds are left."""
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
    """Run a command, and end all its processes. Returns exit code (None: stopped) and output."""
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
    """End the process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shortened(log: Path, start: int) -> str:
    """The log from `start` on. If it exceeds LOGGED bytes, its middle is removed from the log."""
    with log.open("r+b") as file:
        file.seek(start)
        output = file.read()
        if len(output) > LOGGED:
            middle = f"\n[{len(output) - LOGGED} bytes left out]\n".encode()
            output = output[: LOGGED // 2] + middle + output[-LOGGED // 2 :]
            file.seek(start)
            file.truncate()
            file.write(output)
    return output.decode(errors="replace")


# Lines that explain a failure, the most specific first, and which of the matches to take: the first
# error of a compiler, the last exception.
TELLING = (
    (r"^=+ (Invalid|Uninitialized|Error|Barrier|Race)", 0),  # compute-sanitizer
    (r"(:\d+:|\(\d+\):).*\berror\b", 0),
    (r"^FAILED", 0),
    (r"^CMake Error", 0),
    (r"^[\w.]*(Error|Exception|Exit|Warning)\b", -1),
    (r"[Ee]rror|ERROR", -1),
    (r".", -1),
)


def telling_line(output: str) -> str:
    """The line of a failed command's output that best explains the failure."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern, which in TELLING:
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            return found[which][:REASON]
    return "no output"


class Run:
    """The stages of one invocation. The summary is rewritten whenever a stage begins or ends.

    Args:
        out: folder of summary.json and log.txt.
        minutes: the time limit of all stages together.
        about: the first entries of the summary.
    """

    def __init__(self, out: Path, minutes: float, about: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.summary_file, self.log = out / "summary.json", out / "log.txt"
        self.log.write_text("")
        self._deadline = time.monotonic() + 60 * minutes
        self.summary: dict[str, Any] = {**about, "stages": []}

    def stage(self, stage: Stage) -> str:
        """Run a stage if enough time is left. Returns "passed", "failed" or "left out"."""
        left = self._deadline - time.monotonic()
        record: dict[str, Any] = {"name": stage.name, "outcome": "running", "reason": ""}
        self.summary["stages"].append(record)
        self._write()
        if left < stage.need:
            record["outcome"] = "left out"
            record["reason"] = f"{left:.0f} s are left, it needs about {stage.need:.0f}"
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
        except Exception as why:  # a bug in the stage itself
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
        """The outcome of each stage, one line each."""
        lines = []
        for record in self.summary["stages"]:
            seconds = f"{record.get('seconds', 0):.0f} s"
            line = f"{record['name']:9} {record['outcome']:9} {seconds:>6}  {record['reason']}"
            lines.append(line.rstrip())
        return "\n".join(lines)
