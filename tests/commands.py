"""The command line as users run it: real processes, each of which can be found again and killed."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

STORIES = Path(__file__).parents[1] / "examples" / "stories-9m"
"""The bundled model: a Hugging Face checkpoint of 19 MB."""

Refused = Callable[..., str]
"""The command line in this process, which must refuse what it is given, and what it said."""

MARK = "HEADRACE_TEST_RUN"
"""A variable that everything a command starts inherits, however it detaches itself."""


@dataclass
class Command:
    """One running command, its output on files, in a session and process group of its own."""

    process: "subprocess.Popen[bytes]"
    mark: str
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """The command and everything it started that is alive; zombies have no environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def stage(self, index: int) -> psutil.Process:
        """The process of a stage that runs passes: Ray titles it with the call's name."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [p for p in self.processes() if _title(p).startswith(f"ray::stage {index}")]
            return bool(found)

        wait_for(look, 10.0, lambda: f"no stage {index}: {[*map(_title, self.processes())]}")
        return found[0]

    def kill(self) -> None:
        """SIGKILL to the driver alone, then wait until nothing that it started is left.

        Ray's agents look for their raylet from time to time, and that was seen to take over 30 s when
        it died while they started.
        """
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not self.processes(), 120.0, lambda: f"left behind: {self.processes()}")

    def interrupt(self) -> None:
        """Ctrl-C as a terminal does it: SIGINT to the whole process group, and to the stages."""
        for process in self.processes():
            process.send_signal(signal.SIGINT)

    def wait(self, seconds: float = 120.0) -> int:
        return self.process.wait(seconds)

    @property
    def stdout(self) -> str:
        return (self.folder / f"{self.mark}.out").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / f"{self.mark}.err").read_text()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def headrace(folder: Path, *arguments: object, **environment: str) -> Iterator[Command]:
    """`headrace arguments...` in `folder`; killed at the end if it still runs."""
    with python(folder, "-m", "headrace.cluster.cli.main", *arguments, **environment) as command:
        yield command


@contextmanager
def python(folder: Path, *arguments: object, **environment: str) -> Iterator[Command]:
    """`python arguments...`, likewise."""
    mark = uuid.uuid4().hex
    with (folder / f"{mark}.out").open("wb") as out, (folder / f"{mark}.err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), MARK: mark, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    command = Command(process, mark, folder)
    try:
        yield command
    finally:
        if process.poll() is None:
            command.kill()


def wait_for(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    """Poll until `condition` holds; an AssertionError with the complaint after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(0.05)
