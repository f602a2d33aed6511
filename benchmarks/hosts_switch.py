"""The cables and the switch between emulated hosts: what one sends is with another after a while, or never.

    python benchmarks/hosts_switch.py --ports NAME ... --delay 0.01 --rate 100e6

Each port is a TAP device, which is made here and then moved into a host's network namespace: whole Ethernet frames
come out and go in. A frame leaves at the rate of its sender's cable, however many it sends to, and arrives `delay`
seconds later; what finds LIMIT frames waiting is dropped, as by `tc netem rate delay`, of which this does the work
where a kernel lacks it. Commands come on stdin, a line each: "cut A B" loses all between ports A and B, "heal"
ends that. Everything ends with stdin.
"""

import argparse
import fcntl
import os
import selectors
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LIMIT = 1000
FRAME = 65536
BROADCAST = 0x01
"""In the first byte of an address: for everybody."""


def open_tap(name: str) -> int:
    """A descriptor that reads what the device of that name sends. OSError where there is none to be had."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


class Switch:
    """Frames on their way between `taps`."""

    def __init__(self, taps: list[int], delay: float, rate: float) -> None:
        self._taps, self._delay, self._rate = taps, delay, rate
        self._free = [0.0] * len(taps)  # when each cable has sent what it was given
        self._ways: dict[tuple[int, int], deque[tuple[float, bytes]]] = {
            (a, b): deque() for a in range(len(taps)) for b in range(len(taps)) if a != b
        }
        self._where: dict[bytes, int] = {}  # ports by the addresses seen there
        self.cut: set[frozenset[int]] = set()

    def take(self, port: int) -> None:
        """All frames that the port has sent."""
        while True:
            try:
                frame = os.read(self._taps[port], FRAME)
            except BlockingIOError:
                return
            self._queue(port, frame, time.monotonic())

    def _queue(self, port: int, frame: bytes, now: float) -> None:
        self._where[frame[6:12]] = port
        target = None if frame[0] & BROADCAST else self._where.get(frame[:6])
        others = [b for a, b in self._ways if a == port] if target is None else [target]
        self._free[port] = max(now, self._free[port]) + len(frame) * 8 / self._rate
        for other in others:
            way = self._ways.get((port, other))
            if way is not None and len(way) < LIMIT and {port, other} not in self.cut:
                way.append((self._free[port] + self._delay, frame))

    def deliver(self) -> float:
        """Hand over what has arrived; seconds until the next frame does."""
        now, soonest = time.monotonic(), 1.0
        for (a, b), way in self._ways.items():
            while way and way[0][0] <= now:
                _, frame = way.popleft()
                if {a, b} in self.cut:
                    continue
                try:
                    os.write(self._taps[b], frame)
                except OSError:  # the device is down, or the host gone
                    continue
            if way:
                soonest = min(soonest, way[0][0] - now)
        return max(0.0, soonest)

    def obey(self, line: str) -> None:
        words = line.split()
        if words[:1] == ["heal"]:
            self.cut.clear()
        elif words[:1] == ["cut"]:
            self.cut.add(frozenset(map(int, words[1:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ports", nargs="+", required=True)
    parser.add_argument("--delay", type=float, default=0.01)
    parser.add_argument("--rate", type=float, default=100e6, help="bit/s")
    given = parser.parse_args()
    taps = [open_tap(name) for name in given.ports]
    switch = Switch(taps, given.delay, given.rate)
    selector = selectors.DefaultSelector()
    for port, tap in enumerate(taps):
        selector.register(tap, selectors.EVENT_READ, port)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select(switch.deliver()):
            if key.data is not None:
                switch.take(key.data)
                continue
            line = sys.stdin.readline()
            if not line:
                return
            switch.obey(line)
            print("done", flush=True)


if __name__ == "__main__":
    main()
