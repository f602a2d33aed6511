"""Processes that say that they are alive, and what is heard of those that are not."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from commands import wait_for

from headrace.cluster.pulses import Pulses
from headrace.runtime.pulse import Beat, PulseTarget
from headrace.scheduler.errors import HeadraceError, StageLostError

BEATING = """
import ctypes, sys
from headrace.runtime.pulse import PulseTarget, begin_pulse

pulse = begin_pulse(PulseTarget("127.0.0.1", int(sys.argv[1]), sys.argv[2]))
print(flush=True)
ctypes.PyDLL(None).sleep(int(sys.argv[3]))  # no other thread runs meanwhile
"""

HERE = "127.0.0.1"


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pulses() -> Iterator[Pulses]:
    with Pulses(HERE, 0, 2.5) as pulses:
        yield pulses


@pytest.fixture
def begin() -> Iterator[Callable[[PulseTarget, int], "subprocess.Popen[bytes]"]]:
    """Processes that beat for a target and hold the interpreter's lock for so many seconds."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(target: PulseTarget, seconds: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", BEATING, str(target.port), target.name, str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        begun.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def look(pulses: Pulses, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pulses.check()
        time.sleep(0.1)


def test_who_holds_the_interpreter_s_lock_beats_and_who_is_stopped_does_not(
    pulses: Pulses, begin: Any
) -> None:
    busy, stopped = (begin(pulses.expect(stage), 60) for stage in (0, 1))
    look(pulses, 3.5)
    stopped.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    with pytest.raises(StageLostError) as found:
        look(pulses, 10.0)
    assert 2.0 < time.monotonic() - since < 6.0
    assert found.value.silent == (1,)
    host = socket.gethostname()
    assert str(found.value) == (
        f"stage 1 has been stopped by SIGSTOP for 2 s (process {stopped.pid} on {host})"
    )
    pulses.check(0)
    stopped.send_signal(signal.SIGCONT)

    def heard() -> bool:
        with suppress(StageLostError):
            pulses.check()
            return True
        return False

    wait_for(heard, 5.0, lambda: "it is not heard of again")
    assert busy.poll() is None


def test_a_pulse_ends_with_its_process(pulses: Pulses, begin: Any) -> None:
    process = begin(pulses.expect(0), 60)
    [child] = psutil.Process(process.pid).children()
    process.kill()
    wait_for(lambda: not child.is_running(), 5.0, lambda: "it is still there")


def test_a_machine_that_falls_silent_is_told_from_a_process_that_is_stopped() -> None:
    clock = Clock()
    with Pulses(HERE, 0, 5.0, clock) as pulses:
        first, second, _ = (pulses.expect(stage) for stage in range(3))

        def tell(target: PulseTarget) -> None:
            link.sendall(b"nobody\n\xff\n" + Beat(target.name, "S", 7, "far").line())

            def heard() -> bool:
                pulses.check(2)
                return pulses._processes[target.name].beat is not None

            wait_for(heard, 5.0, lambda: "no beat came")

        with socket.create_connection((HERE, first.port)) as link:
            tell(first)
            for _ in range(5):
                clock.now += 1.0
                pulses.check()
            clock.now += 1.0
            with pytest.raises(
                StageLostError, match=r"stage 0 has not been heard of for 5 s \(proc"
            ):
                pulses.check()
            tell(second)
            pulses.check(1)
            pulses.forget(first.name)
            pulses.check()


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HeadraceError, match=f"the driver at {HERE}:{port}: Address already"):
            Pulses(HERE, port, 1.0)
