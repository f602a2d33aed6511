"""The Ray shell around a Stage: messages in, messages out, no logic."""

import ctypes
import logging
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from headrace.cluster.discovery import discover
from headrace.cluster.stage_thread import StageThread
from headrace.cluster.wire import decode, encode
from headrace.runtime.rendezvous import Rendezvous
from headrace.runtime.stage_config import StageConfig
from headrace.scheduler.plan import Pass, PassResult

if TYPE_CHECKING:
    from headrace.runtime.kv_window import PageWindow
    from headrace.runtime.stage import Stage
    from headrace.runtime.stage_log import StageLog

_M_MMAP_THRESHOLD = -3  # malloc.h
_MMAP_BYTES = 1 << 20


def _return_large_blocks() -> None:
    """Have malloc give blocks of a MiB and more back to the system when they are freed.

    By default glibc raises that limit to 32 MiB as it sees such blocks freed, and activations of
    every size then leave holes in the heap: up to 0.26 GB beside a budget of 0.6 GB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


PASSES = "passes"
"""The group of calls that are passes: one runs, and one is made ready. Others come in between."""

CONCURRENCY = {PASSES: 2}


@dataclass(frozen=True, slots=True)
class Connection:
    """How a stage reaches its neighbours. `interface` is Gloo's network interface or ""."""

    rendezvous: Rendezvous
    interface: str


class StageActor:
    """One process, one device. It starts empty, so that the plan can be made from what it measures.

    The driver imports this class, too, before Ray starts: so torch comes later.
    """

    def __init__(self, name: str) -> None:
        logging.basicConfig(level=os.environ.get("HEADRACE_LOG", "WARNING"))
        # Ctrl-C on a terminal reaches every process of the job; the driver decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _return_large_blocks()
        self._name = name
        self._thread = StageThread()
        self._stage: Stage | None = None
        self._log: StageLog | None = None
        # Ends with the process: a pass may still read from it when the log is closed.
        self._window: PageWindow | None = None

    def __repr__(self) -> str:  # what the Ray dashboard shows
        return self._name

    def open(self, device: str) -> None:
        """Import what runs, without models' code, and open the device: seconds that stages share."""
        import torch

        import headrace.runtime.stage  # noqa: F401

        if device.startswith("cuda"):
            self._thread.do(torch.cuda.mem_get_info, device)  # makes the context

    def discover(self, device: str, store: str) -> bytes:
        return encode(self._thread.do(discover, device, store))

    def load(self, payload: bytes) -> str:
        """Build the stage: reads resident layers, starts the ring. Returns the storage chosen."""
        from headrace.runtime.stage import Stage
        from headrace.runtime.stage_log import StageLog
        from headrace.runtime.stage_window import open_window

        config = decode(payload, StageConfig)
        if config.kv_log is not None:
            self._log = StageLog(config)
        if config.device.startswith("cuda"):
            self._cap_device_memory(config)
        self._window = open_window(config, self._log)
        self._stage = self._thread.do(Stage, config, None, self._log, self._window)
        return self._stage.storage_name

    def connect(self, payload: bytes) -> None:
        """Open this stage's ends of the ring's edges; returns when every neighbour has, too."""
        from headrace.runtime.link import connect

        assert self._stage is not None
        stage, connection = self._stage, decode(payload, Connection)
        ends = connect(
            stage.config.stage,
            stage.config.plan.placement.edges,
            connection.rendezvous,
            ring=stage.receive_ring(),
            device=stage.device,
            deadline=stage.config.deadline,
            interface=connection.interface,
            tracer=stage.tracer,
        )
        stage.connect(*ends)

    def run(self, payload: bytes, before: bytes | None = None) -> bytes:
        """One pass: a Pass in, and the PassResult that it needs; a PassResult out.

        A call made while a pass runs makes the next one ready, so that the device need not wait.
        """
        assert self._stage is not None
        stage, a_pass = self._stage, decode(payload, Pass)
        known = None if before is None else decode(before, PassResult)
        work = partial(stage.run, stage.prepare(a_pass), known)
        return encode(self._thread.run(a_pass.step, stage.config.deadline, work))

    def wait_host_tier(self) -> None:
        """Return when what belongs in host RAM is there."""
        assert self._stage is not None
        self._stage.wait_host_tier()

    def take_trace(self) -> bytes:
        """The Trace of the newest passes, for a stage that was told to keep one."""
        assert self._stage is not None and self._stage.recorder is not None
        return encode(self._thread.do(self._stage.recorder.take))

    def log_keys(self) -> list[bytes]:
        """Of the KV pages that this stage has on NVMe, oldest first."""
        assert self._log is not None
        return self._log.keys()

    def log_report(self) -> bytes:
        """The LogReport of this stage's KV pages on NVMe."""
        assert self._log is not None
        return encode(self._log.report())

    def close_log(self) -> None:
        """Keep KV pages on NVMe or delete them, as it was said; passes fail from then on.

        Not on the stage's thread, where a pass may wait for a stage that is gone.
        """
        if self._stage is not None:
            self._stage.end_moves()
        if self._log is not None:
            self._log.close()

    def clock(self) -> int:
        """This node's wall clock, in nanoseconds."""
        return time.time_ns()

    @staticmethod
    def _cap_device_memory(config: StageConfig) -> None:
        """Make the plan's device memory a limit that the allocator enforces."""
        import torch

        device = torch.device(config.device)
        total = torch.cuda.get_device_properties(device).total_memory
        budget = config.device_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
