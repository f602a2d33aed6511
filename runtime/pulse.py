"""A sign of life from a process: a number in the driver's key-value store that goes up while it lives.

A process that is dead is noticed by its sockets. One that is stopped, or whose machine cannot be reached
any more, keeps them open: only its silence tells.
"""

import threading
from contextlib import suppress
from datetime import timedelta
from typing import Self

from headrace.runtime.rendezvous import Rendezvous

BEAT_SECONDS = 1.0


class Pulse:
    """Beats for `stage` until it is closed, or the store is gone."""

    def __init__(self, rendezvous: Rendezvous, stage: int) -> None:
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(rendezvous, stage), name="headrace-pulse", daemon=True
        )
        self._thread.start()

    def _run(self, rendezvous: Rendezvous, stage: int) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it whoever listens
            store = rendezvous.client(timedelta(seconds=10))
            while not self._closed.is_set():
                store.add(beat_key(stage), 1)
                self._closed.wait(BEAT_SECONDS)

    def close(self) -> None:
        """No beat follows but one that is under way."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def beat_key(stage: int) -> str:
    return f"beats/{stage}"
