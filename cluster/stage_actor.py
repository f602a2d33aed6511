"""The Ray shell around a Stage: messages in, messages out, no logic."""

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.cluster.discovery import discover
from headrace.cluster.stage_process import for_good, return_large_blocks, wait_asleep
from headrace.cluster.stage_thread import StageThread
from headrace.cluster.wire import decode, encode
from headrace.runtime.cold.source import Hydration
from headrace.runtime.pulse import PulseTarget, begin_pulse
from headrace.runtime.rendezvous import Rendezvous
from headrace.runtime.stage_config import StageConfig
from headrace.scheduler.contexts import ContextIds
from headrace.scheduler.plan import Adapter, Pass, PassResult

if TYPE_CHECKING:
    from headrace.cluster.telemetry.stage_metrics import StageMetrics
    from headrace.runtime.kv.handover import Contexts
    from headrace.runtime.kv.window import PageWindow
    from headrace.runtime.kv_log.stage_log import StageLog
    from headrace.runtime.memory.message import Measured
    from headrace.runtime.stage import Stage

T = TypeVar("T")

PASSES = "passes"
"""The group of calls that are passes: one runs, and one is made ready. Others come in between."""

CONTROL = "control"
"""The group of calls that break passes off: they come in while anything else is under way."""

NODE_DIGITS = 12
"""Of a Ray node's id, which is random: enough to tell the nodes of a cluster apart."""

CONCURRENCY = {PASSES: 2, CONTROL: 1}


@dataclass(frozen=True, slots=True)
class Connection:
    """How a stage reaches its neighbours: over the `interface` of that name or network, or "" for that of
    its address in the Ray cluster. One that a user named is `pinned`: NCCL keeps to it, too."""

    rendezvous: Rendezvous
    interface: str
    pinned: bool = False


def _interface_of(connection: Connection) -> str:
    """The name of this machine's interface for a connection. HeadraceError when there is none."""
    import ray

    from headrace.runtime.interfaces import bind_nccl, find_interface

    found = find_interface(connection.interface or ray.util.get_node_ip_address())
    if connection.pinned:
        bind_nccl(found)
    return found.name


class StageActor:
    """One process, one device. It starts empty, so that the plan can be made from what it measures.

    The driver imports this class, too, before Ray starts: so torch comes later. `ring` is what metrics of it
    are told apart by; "" emits none. It beats for `pulse` from the first on, if somebody listens.
    """

    def __init__(self, name: str, ring: str = "", pulse: PulseTarget | None = None) -> None:
        self._pulse = None if pulse is None else begin_pulse(pulse)
        logging.basicConfig(level=os.environ.get("HEADRACE_LOG", "WARNING"))
        # Ctrl-C on a terminal reaches every process of the job; the driver decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return_large_blocks()
        wait_asleep()
        self._name, self._ring = name, ring
        self._metrics: StageMetrics | None = None
        self._thread = StageThread()
        self._stage: Stage | None = None
        self._log: StageLog | None = None
        self._trace_passes = (
            0  # that a trace is to have, which was asked for before the stage was there
        )
        # Ends with the process: a pass may still read from it when the log is closed.
        self._window: PageWindow | None = None

    def __repr__(self) -> str:  # what the Ray dashboard shows
        return self._name

    @for_good()
    def open(self, device: str) -> None:
        """Import what runs, without models' code, and open the device: seconds that stages share."""
        import torch

        import headrace.runtime.stage  # noqa: F401

        if device.startswith("cuda"):
            self._thread.do(torch.cuda.mem_get_info, device)  # makes the context

    def hydrate(self, payload: bytes) -> int:
        """Fetch what a Hydration says and this node lacks. Returns how many bytes came."""
        from headrace.runtime.cold.pull import hydrate

        return hydrate(decode(payload, Hydration)).fetched

    def receive(self, payload: bytes, digest: str, peers: list[Any]) -> int:
        """The same from stores of other nodes, those of the StorePeers `peers`."""
        from headrace.cluster.peers import ray_peers
        from headrace.runtime.cold.receive import receive

        return receive(decode(payload, Hydration), digest, ray_peers(peers))

    def discover(self, device: str, store: str) -> bytes:
        """A Discovery. Its node is one of the Ray cluster: machines may have the same name."""
        import ray

        found = self._thread.do(discover, device, store)
        node = ray.get_runtime_context().get_node_id()
        return encode(replace(found, node=f"{found.node} ({node[:NODE_DIGITS]})"))

    def measure_link(self, payload: bytes, end: int, device: str) -> bytes:
        """The Hop between this process and another one, which is told the same Connection at the same time and
        the other `end`."""
        import torch

        from headrace.runtime.link_speed import measure_link

        connection, where = decode(payload, Connection), torch.device(device)
        interface = _interface_of(connection)
        work = partial(measure_link, end, connection.rendezvous, where, interface)
        return encode(self._thread.do(work))

    @for_good()
    def load(
        self, payload: bytes, joins_at: int | None = None, keys: dict[str, bytes] | None = None
    ) -> str:
        """Build the stage: reads resident layers, starts the ring. Returns the storage chosen.

        Its log's tenants have `keys` that are in no file. One that `joins_at` a pass gets its places on
        NVMe with `open_log`, when the stage before has left them.
        """
        from headrace.cluster.telemetry.stage_metrics import StageMetrics
        from headrace.runtime.kv.stage_window import open_window
        from headrace.runtime.kv_log.stage_log import StageLog
        from headrace.runtime.stage import Stage

        config = decode(payload, StageConfig)
        if joins_at is not None:
            self._thread.begin_at(joins_at)
        elif config.kv_log is not None:
            self._log = StageLog(config, keys)
            self._window = open_window(config, self._log)
        if config.device.startswith("cuda"):
            self._cap_device_memory(config)
        self._stage = self._thread.do(Stage, config, None, self._log, self._window)
        if self._trace_passes:
            self.begin_trace(self._trace_passes)
        if self._ring:
            self._metrics = StageMetrics(self._ring, config.stage, self._log)
        return self._stage.storage_name

    def connect(self, payload: bytes) -> None:
        """Open this stage's ends of the ring's edges; returns when every neighbour has, too.

        Ends that it has are closed first: no pass is under way.
        """
        from headrace.runtime.link import connect

        assert self._stage is not None
        stage, connection = self._stage, decode(payload, Connection)
        interface = _interface_of(connection)
        stage.disconnect()
        ends = connect(
            stage.config.stage,
            stage.config.plan.placement.edges,
            connection.rendezvous,
            ring=stage.receive_ring(),
            device=stage.device,
            deadline=stage.config.deadline,
            interface=interface,
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
        result = self._thread.run(a_pass.step, stage.config.deadline, work)
        if self._metrics is not None:
            self._metrics.passed(result.times)
        return encode(result)

    def break_off(self, step: int) -> bool:
        """Give up passes before `step`, which is the next one to come. Returns when nothing of them is under
        way any more, and whether there is a stage here, with its weights and pages."""
        self._thread.begin_at(step)
        if self._stage is None:
            return False
        self._stage.break_off()
        self._thread.do(self._stage.rewind)
        return True

    def wait_host_tier(self) -> None:
        """Return when what belongs in host RAM is there."""
        assert self._stage is not None
        self._stage.wait_host_tier()

    def check_adapter(self, payload: bytes) -> None:
        """StoreError when this stage could not load the Adapter."""
        assert self._stage is not None
        self._stage.check_adapter(decode(payload, Adapter))

    def import_models(self) -> None:
        """Import what `load` would: only to see what that takes by itself."""
        import headrace.runtime.model  # noqa: F401

    def memory(self) -> bytes:
        """What this process's memory is made of, as Measured; no pass is under way."""
        return encode(self._thread.do(self._measure))

    def _measure(self) -> "Measured":
        from headrace.runtime.memory.measure import measure

        if self._stage is None:
            return measure()
        owners = self._stage, self._log, self._window
        held = chain.from_iterable(owner.memory() for owner in owners if owner is not None)
        return measure(held, self._stage.device)

    def reset_peaks(self) -> None:
        """Have what `memory` says of peaks begin anew."""
        from headrace.runtime.memory.measure import reset_peaks

        assert self._stage is not None
        self._thread.do(reset_peaks, self._stage.device)

    def begin_trace(self, passes: int) -> None:
        """Record the newest `passes` passes from the next one on, or from the first one."""
        self._trace_passes = passes
        if self._stage is not None:
            self._thread.do(self._stage.begin_trace, passes)

    def end_trace(self) -> bytes | None:
        """The Trace of what was recorded, if anything was; no more is."""
        self._trace_passes = 0
        trace = None if self._stage is None else self._thread.do(self._stage.end_trace)
        return None if trace is None else encode(trace)

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

    def export_payload(self, ids: bytes, path: str) -> bytes:
        """Write what these ContextIds hold to a file in memory. Returns the Manifest."""
        from headrace.runtime.kv.payload import write_payload

        chosen = decode(ids, ContextIds)
        return self._on_contexts(lambda contexts: write_payload(contexts, chosen, path).encode())

    def import_payload(self, manifest: bytes, path: str) -> bytes:
        """Take over what another process wrote to a file in memory. Returns what was Taken."""
        from headrace.runtime.kv.handover import Manifest
        from headrace.runtime.kv.payload import read_payload

        written = Manifest.decode(manifest)
        return encode(self._on_contexts(lambda contexts: read_payload(contexts, written, path)))

    def cut(self, ids: bytes) -> tuple[bytes, list[bytes]]:
        """The PageIdentity here, and what these ContextIds hold, in Cuts."""
        chosen = decode(ids, ContextIds)
        identity, cuts = self._on_contexts(lambda own: (own.identity, own.cuts(chosen)))
        return encode(identity), [encode(cut) for cut in cuts]

    def export_cut(self, cut: bytes) -> tuple[bytes, bytes]:
        """The Chunk of a Cut, and its bytes."""
        from headrace.runtime.kv.handover import Cut

        chosen = decode(cut, Cut)
        chunk, payload = self._on_contexts(lambda contexts: contexts.export(chosen))
        return encode(chunk), bytes(payload)

    def import_chunk(self, identity: bytes, chunk: bytes, payload: bytes) -> bytes:
        """Take over a chunk from where pages have that PageIdentity. Returns what was Taken."""
        from headrace.runtime.kv.handover import Chunk, take_chunk
        from headrace.runtime.kv.identity import PageIdentity

        found = decode(identity, PageIdentity), decode(chunk, Chunk), memoryview(payload)
        return encode(self._on_contexts(lambda contexts: take_chunk(contexts, *found)))

    def _on_contexts(self, work: "Callable[[Contexts], T]") -> T:
        """What `work` makes of the stage's contexts, on the thread that works on its device."""
        assert self._stage is not None
        stage = self._stage

        def work_on_them() -> T:
            with stage.contexts() as contexts:
                return work(contexts)

        return self._thread.do(work_on_them)

    def open_log(self, keys: dict[str, bytes]) -> None:
        """Go on with the log of the stage that this one replaces; `keys` are those in no file."""
        from headrace.runtime.kv.stage_window import open_window
        from headrace.runtime.kv_log.stage_log import StageLog

        assert self._stage is not None and self._log is None
        config = self._stage.config
        self._log = StageLog(config, keys)
        self._window = open_window(config, self._log)
        self._stage.attach(self._log, self._window)
        if self._metrics is not None:
            self._metrics.watch(self._log)

    def leave(self, *, hand_over: bool) -> dict[str, bytes]:
        """Close the stage, which another process replaces. Returns keys of its log that are in no file,
        if that is handed over; else its pages are kept or deleted, as it was said."""
        assert self._stage is not None
        keys = {}
        self._stage.end_moves()
        if self._log is not None and hand_over:
            keys = self._log.hand_over()
        elif self._log is not None:
            self._log.close()
        self._thread.do(self._stage.close)
        if self._window is not None:
            self._window.close()
        if self._metrics is not None:
            self._metrics.close()
        return keys

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
