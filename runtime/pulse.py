"""A sign of life from a process, once a second, from its first moment on.

A process that is dead is noticed by its sockets. One that is stopped, or whose machine cannot be reached
any more, keeps them open: only its silence tells.

It is a small process of its own (13 MB) that looks at the state of the one that began it: a thread there would
fall silent where that one holds the interpreter's lock for long, as it does while the loader reads libraries of
a GB from a slow drive, and a stage that merely starts slowly would be taken for dead. (Measured on an H200 with
a fast drive: importing torch kept a thread from running for 0.9 s, reading and pinning weights never did.) So
this file runs as a program, too, and imports nothing but the standard library.
"""

import os
import select
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEAT_SECONDS = 1.0

LINK_SECONDS = 5.0
"""How long a beat may be on its way before another connection is tried: a network that is back is found soon."""

STOPPED = frozenset("Tt")
"""States of a process in /proc that is stopped: by a signal, or by a debugger."""


@dataclass(frozen=True, slots=True)
class PulseTarget:
    """Where somebody listens for the beats of the process that they call `name`."""

    host: str
    port: int
    name: str


@dataclass(frozen=True, slots=True)
class Beat:
    """What was seen of the process `name`: the state that /proc says, and its id on that machine."""

    name: str
    state: str
    pid: int
    machine: str

    def line(self) -> bytes:
        return f"{self.name} {self.state} {self.pid} {self.machine}\n".encode()

    @classmethod
    def parse(cls, line: bytes) -> "Beat":
        """Of `line`, without its end. ValueError when it is none."""
        name, state, pid, machine = line.decode().split()
        return cls(name, state, int(pid), machine)


def begin_pulse(target: PulseTarget) -> "subprocess.Popen[bytes]":
    """Beats for this process until it ends, or the input of what is returned is closed."""
    # Isolated, for it has to run before, and whatever, this process imports.
    program = [sys.executable, "-I", "-S", __file__, target.host, str(target.port), target.name]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def _state(pid: int) -> str:
    """The letter that /proc has; what comes before, the program's name, may have spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]


def _beat(host: str, port: int, name: str) -> None:
    pid, machine = os.getppid(), socket.gethostname()
    while True:
        with suppress(OSError), socket.create_connection((host, port), LINK_SECONDS) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LINK_SECONDS * 1000))
            while True:
                link.sendall(Beat(name, _state(pid), pid, machine).line())
                _rest()
        _rest()


def _rest() -> None:
    """Until the next beat, or the end: the input is closed when the process that began this one ends."""
    if select.select([sys.stdin], [], [], BEAT_SECONDS)[0]:
        sys.exit()


if __name__ == "__main__":
    _beat(sys.argv[1], int(sys.argv[2]), sys.argv[3])
