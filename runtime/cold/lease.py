"""Pushes and removals keep out of each other's way: an object that a push found must not go.

Whoever begins writes a lease and only then looks for others, so that of two that begin at once at least
one sees the other. Pushes do not mind each other. A lease whose holder was killed ends by itself.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Self
from uuid import uuid4

from headrace.runtime.cold.tier import ColdTier
from headrace.scheduler.errors import ColdTierError

LEASES = "leases"
LEASE_SECONDS = 900.0
"""How long a lease is good for; clocks of machines that share a tier may differ by some of it."""

REFRESH_SECONDS = 60.0

PUSH = "push"
REMOVAL = "removal"


class Lease:
    """Held from the start until close(). ColdTierError where another one is in the way."""

    def __init__(self, tier: ColdTier, kind: str, clock: Callable[[], float] = time.time) -> None:
        self._tier, self._kind, self._clock = tier, kind, clock
        self._path: str | None = f"{LEASES}/{kind}-{uuid4().hex}.json"
        self._written = 0.0
        self._write()
        try:
            self._refuse_others()
        except BaseException:
            self.close()
            raise

    def refresh(self) -> None:
        """To be called often. ColdTierError where that was not done for so long that others may have gone on."""
        waited = self._clock() - self._written
        if waited > LEASE_SECONDS:
            raise ColdTierError(
                f"nothing was written to {self._tier.url} for {waited:.0f} s, and others may have gone on"
                " meanwhile: run the same command again, which goes on where it was"
            )
        if waited > REFRESH_SECONDS:
            self._write()

    def _write(self) -> None:
        assert self._path is not None, "the lease is closed"
        now = self._clock()
        held = {"at": now, "host": os.uname().nodename, "pid": os.getpid()}
        self._tier.write(self._path, json.dumps(held).encode())
        self._written = now

    def _refuse_others(self) -> None:
        for entry in self._tier.entries(LEASES):
            kind, path = entry.name.partition("-")[0], f"{LEASES}/{entry.name}"
            if path == self._path or kind not in (PUSH, REMOVAL):
                continue
            if PUSH == kind == self._kind:
                continue
            held = self._tier.read(path)
            if held is None:
                continue
            at, who = _holder(held)
            if self._clock() - at > LEASE_SECONDS:
                self._tier.remove(path)
                continue
            raise ColdTierError(
                f"a {kind} is under way in {self._tier.url} ({who}): wait until it ends; if it was killed,"
                f" {LEASE_SECONDS / 60:.0f} minutes"
            )

    def close(self) -> None:
        if self._path is not None:
            path, self._path = self._path, None
            self._tier.remove(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _holder(held: bytes) -> tuple[float, str]:
    """When a lease was written, and by whom; long ago for one that cannot be read."""
    try:
        found = json.loads(held)
        return float(found["at"]), f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return 0.0, "unknown"
