"""Kills a job's driver at a random instant, and resumes the job: what that takes, and whether its rows are the same."""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from headrace.cluster.journal import journal_path
from headrace.cluster.progress import progress_path

PROMPTS = Path(__file__).parents[1] / "examples" / "prompts.jsonl"

END_SECONDS = 120.0
"""How long what a driver started may take to end after it: Ray's agents look for their raylet now and then."""


@dataclass(frozen=True)
class DriverCase:
    """One kill `delay` seconds after the start: rows that were written then, and how much longer all of it took
    than a run that was let alone."""

    delay: float
    same: bool
    rows: int
    longer: float


@dataclass(frozen=True)
class DriverJob:
    """`headrace generate` with `options`, over and over, in `folder`."""

    options: list[str]
    folder: Path
    rows: int

    def __post_init__(self) -> None:
        lines = PROMPTS.read_text().splitlines()[: self.rows]
        (self.folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    def start(self) -> "subprocess.Popen[bytes]":
        paths = ["--input", str(self.folder / "in.jsonl"), "--output", str(self.output)]
        command = [sys.executable, "-m", "headrace.cluster.cli.main", "generate", *self.options]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([*command, *paths], stdout=log, stderr=log)

    def lines(self) -> list[str]:
        text = self.output.read_text() if self.output.exists() else ""
        return text.splitlines()

    def finish(self) -> list[str]:
        """Run to the end. All rows, in the order of their ids."""
        assert self.start().wait() == 0, (self.folder / "log").read_text()
        return sorted(self.lines(), key=lambda line: str(json.loads(line)["id"]))

    def whole(self) -> tuple[list[str], float, float]:
        """The rows of a run that is let alone, and the seconds to the first of them and to its end."""
        began = time.monotonic()
        running = self.start()
        while not self.lines() and running.poll() is None:
            time.sleep(0.05)
        first = time.monotonic() - began
        running.wait()
        seconds = time.monotonic() - began
        rows = self.finish()  # does nothing but check
        self.forget()
        return rows, first, seconds

    def kill(self, delay: float) -> list[psutil.Process]:
        """SIGKILL to the driver alone. All that it started, which has to end by itself."""
        running = self.start()
        time.sleep(delay)
        started: list[psutil.Process] = psutil.Process(running.pid).children(recursive=True)
        running.kill()
        running.wait()
        return started

    def forget(self) -> None:
        for path in (self.output, journal_path(self.output), progress_path(self.output)):
            path.unlink(missing_ok=True)


def kill_drivers(
    options: list[str], rows: int, instants: int, rng: random.Random
) -> list[DriverCase]:
    """Each at an instant from when a run has loaded to before it ends."""
    cases: list[DriverCase] = []
    with tempfile.TemporaryDirectory() as folder:
        job = DriverJob(options, Path(folder), rows)
        want, first, seconds = job.whole()
        for _ in range(instants):
            delay = rng.uniform(0.6 * first, 0.95 * seconds)
            began = time.monotonic()
            started = job.kill(delay)
            written = len(job.lines())
            same = job.finish() == want
            took = time.monotonic() - began
            _, left = psutil.wait_procs(started, END_SECONDS)
            assert not left, f"left behind: {left}"
            cases.append(DriverCase(delay, same, written, took - seconds))
            print(cases[-1], file=sys.stderr, flush=True)
            job.forget()
    print(f"driver: undisturbed {seconds:.1f} s, the first row after {first:.1f} s")
    return cases
