"""Hears whether the processes of stages are alive while somebody waits for them."""

import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from uuid import uuid4

from headrace.runtime.pulse import STOPPED, Beat, PulseTarget
from headrace.runtime.rendezvous import listen
from headrace.scheduler.errors import StageLostError

MOST_BETWEEN = 2.0
"""Seconds that count between two looks: a machine that was suspended has its stages heard of first."""

LONGEST_LINE = 1024
"""Bytes. Whoever sends more than that is no stage."""


@dataclass(slots=True)
class _Process:
    """A stage's, of which `beat` was heard last, and none but of a stopped process for `silence` seconds."""

    stage: int
    beat: Beat | None = None
    silence: float = 0.0


class Pulses:
    """Listens at `host` and `port` (0: a free one). HeadraceError when it cannot.

    Processes of which nothing new was heard for `patience` seconds while they were waited for are silent. One
    that was never heard of is not: Ray may need long to start it. Any thread may ask.
    """

    def __init__(
        self,
        host: str,
        port: int,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listener = listen(host, port)
        self._listener.setblocking(False)
        self._host, self._port = host, int(self._listener.getsockname()[1])
        self._patience, self._clock, self._looked = patience, clock, clock()
        self._processes: dict[str, _Process] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def expect(self, stage: int) -> PulseTarget:
        """A new process of the stage has to beat for this, until it is forgotten by its name."""
        target = PulseTarget(self._host, self._port, uuid4().hex)
        with self._lock:
            self._processes[target.name] = _Process(stage)
        return target

    def forget(self, name: str) -> None:
        with self._lock:
            del self._processes[name]

    def check(self, stage: int | None = None) -> None:
        """StageLostError with the stages that are silent, if it is `stage`, where that is given."""
        with self._lock:
            self._look()
            silent = [
                process
                for process in self._processes.values()
                if process.silence > self._patience and stage in (None, process.stage)
            ]
        if silent:
            said = "; ".join(self._describe(process) for process in silent)
            raise StageLostError(said, tuple(sorted({process.stage for process in silent})))

    def _look(self) -> None:
        now = self._clock()
        passed, self._looked = min(now - self._looked, MOST_BETWEEN), now
        for process in self._processes.values():
            process.silence += passed if process.beat is not None else 0.0
        while ready := self._selector.select(0):
            for key, _ in ready:
                self._hear(key)

    def _hear(self, key: selectors.SelectorKey) -> None:
        link = key.fileobj
        assert isinstance(link, socket.socket)
        if link is self._listener:
            with suppress(OSError):  # whoever came has gone again
                found, _ = link.accept()
                found.setblocking(False)
                self._selector.register(found, selectors.EVENT_READ, bytearray())
            return
        try:
            received = link.recv(1 << 16)
        except OSError:
            received = b""
        *lines, rest = (bytes(key.data) + received).split(b"\n")
        key.data[:] = rest
        for line in lines:
            self._note(line)
        if not received or len(rest) > LONGEST_LINE:
            self._selector.unregister(link)
            link.close()

    def _note(self, line: bytes) -> None:
        with suppress(ValueError):
            beat = Beat.parse(line)
            if (process := self._processes.get(beat.name)) is not None:
                process.beat = beat
                if beat.state not in STOPPED:
                    process.silence = 0.0

    def _describe(self, process: _Process) -> str:
        beat, seconds = process.beat, f"{self._patience:.0f} s"
        assert beat is not None
        where = f"process {beat.pid} on {beat.machine}"
        if beat.state in STOPPED:
            how = "by SIGSTOP" if beat.state == "T" else "by a debugger"
            return f"stage {process.stage} has been stopped {how} for {seconds} ({where})"
        return (
            f"stage {process.stage} has not been heard of for {seconds} ({where}): its machine is stopped,"
            " too, or cannot be reached"
        )

    def close(self) -> None:
        with self._lock:
            for key in [*(self._selector.get_map() or {}).values()]:
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
            self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
