"""A new process in place of a stage's, with what that holds for requests.

Where the old one takes the bundle that the new one is to have, the new one starts when it is gone: its
contexts are in shared memory of the machine meanwhile. On another node both are there at once. Contexts
go from one to the other through Ray's object store then, few chunks at a time, and until the last one
has come nothing is lost if the new process cannot be had.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.cluster.members import Members
from headrace.cluster.pipeline import gather
from headrace.cluster.processes import START_SECONDS, find_node
from headrace.cluster.wire import decode, encode
from headrace.runtime.kv.shared_payload import SharedPayload
from headrace.scheduler.contexts import ContextIds, Taken
from headrace.scheduler.errors import HeadraceError, StageLostError

log = logging.getLogger(__name__)

CHUNKS_ON_THEIR_WAY = 2
"""One is taken over while the next one is written."""

SPARE_SECONDS = 10.0
"""How long a processor or a GPU may take to be free that a stage was just stopped on."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """What was handed over to a stage's new process: so many pages, tails and host slots in `nbytes`, beside
    those that were `lost` on the way, which `requests` running requests compute again."""

    stage: int
    pages: int
    nbytes: int
    lost: int
    requests: int
    seconds: float


class PayloadKeeper:
    """Keeps shared memory on its node while the stage there is replaced."""

    def __init__(self) -> None:
        self._payload = SharedPayload()

    def path(self) -> str:
        return self._payload.path


class StageReplacer:
    """Replaces processes of `members`. No pass or move is under way meanwhile."""

    def __init__(self, members: Members) -> None:
        self._members, self._processes = members, members.processes

    def find(self, stage: int, node: str | None) -> str | None:
        """The id of `node`. HeadraceError for a stage or a node that there is not."""
        stages = len(self._members.configs)
        if not 0 <= stage < stages:
            raise HeadraceError(f"there is no stage {stage} to replace: they are 0 to {stages - 1}")
        return None if node is None else find_node(node)

    def replace(self, stage: int, ids: ContextIds, step: int, node: str | None) -> Taken:
        """Have another process take over what the stage holds under `ids`, and run passes from `step` on.

        It starts on the node with the id `node`, or where the stage's bundle is. HeadraceError when it
        cannot be had: then the stage is as it was, unless it had to go first.
        """
        before = self._processes.node_of(stage)
        here = node or self._processes.bundle_node(stage)
        if node is None and self._processes.in_bundle(stage):
            new, taken, keys = self._in_place(stage, ids, step)
        else:
            new, taken, keys = self._beside(stage, ids, step, node, hand_over=here == before)
        self._members.seat(stage, new, node)
        self._members.open_log(stage, keys)
        self._members.connect()
        return taken

    def _in_place(
        self, stage: int, ids: ContextIds, step: int
    ) -> tuple[Any, Taken, dict[str, bytes]]:
        old = self._processes.actors[stage]
        with _shared_memory(self._processes.bundle_node(stage)) as path:
            exporting = old.export_payload.remote(encode(ids), path)
            manifest = self._ask(stage, exporting, "handing KV pages over")
            keys = self._stop(stage, hand_over=True)
            new = self._processes.start(stage)
            try:
                self._load(stage, new, step)
                taken = self._taken(stage, new.import_payload.remote(manifest, path))
            except BaseException:
                self._processes.stop(new)
                raise
            return new, taken, keys

    def _beside(
        self, stage: int, ids: ContextIds, step: int, node: str | None, *, hand_over: bool
    ) -> tuple[Any, Taken, dict[str, bytes]]:
        if node is not None:
            _check_spare(self._members.configs[stage].device)
        new = self._processes.start(stage, node)
        try:
            self._load(stage, new, step)
            taken = self._stream(stage, new, ids)
        except StageLostError as error:
            self._processes.stop(new)
            raise StageLostError(str(error)) from error  # not the old one, that is known
        except BaseException:
            self._processes.stop(new)
            raise
        return new, taken, self._stop(stage, hand_over=hand_over)

    def _load(self, stage: int, new: Any, step: int) -> None:
        doing = f"replacing stage {stage}"
        self._members.open(stage, new, doing)
        self._members.load(stage, new, step, doing)

    def _stream(self, stage: int, new: Any, ids: ContextIds) -> Taken:
        """Chunks through the object store; they are gone from there when they were taken."""
        old, taken = self._processes.actors[stage], Taken()
        identity, cuts = self._ask(stage, old.cut.remote(encode(ids)), "handing KV pages over")
        under_way: deque[Any] = deque()
        for cut in cuts:
            if len(under_way) == CHUNKS_ON_THEIR_WAY:
                taken = taken.plus(self._taken(stage, under_way.popleft()))
            chunk, payload = old.export_cut.options(num_returns=2).remote(cut)
            under_way.append(new.import_chunk.remote(identity, chunk, payload))
        for ref in under_way:
            taken = taken.plus(self._taken(stage, ref))
        return taken

    def _taken(self, stage: int, ref: Any) -> Taken:
        return decode(self._ask(stage, ref, "taking KV pages over"), Taken)

    def _stop(self, stage: int, *, hand_over: bool) -> dict[str, bytes]:
        """End the stage's process. Returns what the next one needs to read its log."""
        old = self._processes.actors[stage]
        self._members.leave_trace(stage)
        self._members.leave_log(stage)
        keys = self._ask(stage, old.leave.remote(hand_over=hand_over), "leaving")
        self._processes.stop(old)
        return dict(keys)

    def _ask(self, stage: int, ref: Any, doing: str) -> Any:
        return self._members.ask(stage, ref, f"replacing stage {stage}: {doing}")


@contextmanager
def _shared_memory(node: str) -> Iterator[str]:
    """A path on the node, to memory that is gone when the block or this process ends."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    keeper = ray.remote(num_cpus=0, scheduling_strategy=strategy)(PayloadKeeper).remote()
    try:
        yield gather([keeper.path.remote()], START_SECONDS, doing="making shared memory")[0]
    finally:
        ray.kill(keeper)


def _check_spare(device: str) -> None:
    """HeadraceError when no node has a processor, or a GPU, beside those of the stages: Ray would wait."""
    wanted = "GPU" if device.startswith("cuda") else "CPU"
    end = time.monotonic() + SPARE_SECONDS
    while ray.available_resources().get(wanted, 0) < 1:
        if time.monotonic() > end:
            raise HeadraceError(
                f"the Ray cluster has no {wanted} to spare: a stage that moves to a node needs one there"
                " while the old one is still running. Add a node, or leave the node out to have the"
                " stage start again where it is"
            )
        time.sleep(0.1)
