"""What benchmarks of whole engines share: driving one, finding its steady passes, raw bandwidths."""

import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headrace.cluster.engine import Engine
from headrace.runtime.storage import BufferedStorage, DirectStorage, Storage
from headrace.runtime.store import Block
from headrace.runtime.tiers import AlignedBuffer
from headrace.scheduler.errors import HeadraceError, StoreError
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.request import SamplingParams

GIGA = 1e9
FIRST_TOKEN, LAST_TOKEN = 4, 4096
DISK_SECONDS = 8.0
COPIES = 8


def random_prompts(count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Prompts of valid ids that share no prefix."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(tokens)] for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Step:
    """One pass as the engine saw it: wall seconds, tokens committed, requests that ended."""

    seconds: float
    committed: int
    ended: int
    stages: tuple[StageTimes, ...]


@dataclass(slots=True)
class DeviceMeter:
    """Highest device memory in use above `base`, over all processes; zeros without CUDA."""

    base: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.base = self._used()
        self.peak = list(self.base)

    def sample(self) -> None:
        self.peak = [max(a, b) for a, b in zip(self.peak, self._used(), strict=True)]

    @property
    def most(self) -> int:
        return max((b - a for a, b in zip(self.base, self.peak, strict=True)), default=0)

    @staticmethod
    def _used() -> list[int]:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        pairs = (torch.cuda.mem_get_info(i) for i in range(count))
        return [total - free for free, total in pairs]


class Driver:
    """Runs requests through an engine and notes every pass."""

    def __init__(self, engine: Engine, meter: DeviceMeter | None = None) -> None:
        self._engine = engine
        self._meter = meter
        self.steps: list[Step] = []

    def add(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self._engine.add(list(prompt), params, seed=i)

    def run(self) -> None:
        while self._engine.has_work:
            self.step()

    def step(self) -> Step:
        stats = self._engine.stats
        tokens, before = stats.output_tokens, list(stats.stages)
        started = time.perf_counter()
        ended = len(self._engine.step())
        seconds = time.perf_counter() - started
        stages = tuple(new.since(old) for new, old in zip(stats.stages, before, strict=True))
        step = Step(seconds, stats.output_tokens - tokens, ended, stages)
        self.steps.append(step)
        if self._meter is not None and len(self.steps) % 4 == 1:
            self._meter.sample()
        return step


@dataclass(frozen=True, slots=True)
class Steady:
    """Rounds in which every sequence advances by one token, and what came before.

    A round is as many passes as there are in flight. `rounds` are seconds, `stages` the medians of
    each stage's times and bytes over them.
    """

    prefill_seconds: float
    rounds: tuple[float, ...]
    stages: tuple[StageTimes, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


def steady(steps: Sequence[Step], batch: int, passes_in_flight: int) -> Steady:
    """The rounds of decodes only: after all prompts are computed, until the first request ends.

    Raises HeadraceError when there are none, because prompts took longer than outputs.
    """
    width = passes_in_flight
    # A request is in one pass of a round at most. The first round that gives every sequence a token
    # may have had prompts in it, the next one has not.
    first = next(
        (
            end
            for end in range(width, len(steps) + 1)
            if sum(step.committed for step in steps[end - width : end]) >= batch
        ),
        len(steps),
    )
    end = next((i for i, step in enumerate(steps) if step.ended), len(steps))
    rounds = [steps[i : i + width] for i in range(first, end - width + 1, width)]
    if not rounds:
        raise HeadraceError(
            f"no pass decoded all {batch} sequences and nothing else; give more new tokens or fewer "
            "prompt tokens"
        )
    return Steady(
        sum(step.seconds for step in steps[:first]),
        tuple(sum(step.seconds for step in one) for one in rounds),
        tuple(_median(rounds, stage) for stage in range(len(steps[0].stages))),
    )


def _median(rounds: Sequence[Sequence[Step]], stage: int) -> StageTimes:
    def middle(name: str) -> float:
        totals = [sum(getattr(step.stages[stage], name) for step in one) for one in rounds]
        return float(statistics.median(totals))

    return StageTimes(
        stage,
        middle("total"),
        middle("weights_wait"),
        middle("link_wait"),
        int(middle("nvme_bytes")),
        int(middle("host_bytes")),
    )


def disk_gbps(blocks: Sequence[Block], seconds: float = DISK_SECONDS) -> float:
    """Reading these blocks into host memory, the next one asked for while one is on its way.

    O_DIRECT, or past the page cache where the filesystem has no O_DIRECT.
    """
    try:
        return _read_rate(DirectStorage(torch.device("cpu")), blocks, seconds)
    except StoreError:
        return _read_rate(BufferedStorage(torch.device("cpu")), blocks, seconds)


def _read_rate(storage: Storage, blocks: Sequence[Block], seconds: float) -> float:
    largest = max(block.nbytes for block in blocks)
    dests = [AlignedBuffer(largest).tensor.fill_(0) for _ in range(2)]
    done = 0
    try:
        started = time.perf_counter()
        under_way = [
            storage.load(blocks[0].file, blocks[0].data_offset, dests[0][: blocks[0].nbytes])
        ]
        for i, block in enumerate(blocks):
            if i + 1 < len(blocks):
                following = blocks[i + 1]
                dest = dests[(i + 1) % 2][: following.nbytes]
                under_way.append(storage.load(following.file, following.data_offset, dest))
            under_way[i].wait()
            done += block.nbytes
            if time.perf_counter() - started > seconds:
                break
        rate = done / (time.perf_counter() - started) / GIGA
        for load in under_way:
            load.wait()
        return rate
    finally:
        storage.close()


def copy_gbps(device: str, devices: int, nbytes: int) -> float:
    """GB/s into each of `devices` devices at once from pinned memory; on a CPU a plain copy."""
    if device == "cpu":
        source, dest = (AlignedBuffer(nbytes).tensor.fill_(1) for _ in range(2))
        started = time.perf_counter()
        for _ in range(COPIES):
            dest.copy_(source)
        return COPIES * nbytes / (time.perf_counter() - started) / GIGA
    with AlignedBuffer(nbytes, pinned=True) as pinned:
        pinned.tensor.fill_(1)
        places = [torch.device("cuda", i) for i in range(devices)]
        dests = [torch.empty(nbytes, dtype=torch.uint8, device=place) for place in places]
        for copies in (1, COPIES):  # once to warm up
            _synchronize(places)
            started = time.perf_counter()
            for _ in range(copies):
                for dest in dests:
                    dest.copy_(pinned.tensor, non_blocking=True)
            _synchronize(places)
            seconds = time.perf_counter() - started
    del dests
    torch.cuda.empty_cache()
    return COPIES * nbytes / seconds / GIGA


def _synchronize(places: Sequence[torch.device]) -> None:
    for place in places:
        torch.cuda.synchronize(place)


def memory_cgroup(own: str, root: Path) -> tuple[Path, str]:
    """The memory cgroup that /proc/self/cgroup (`own`) names, and the file that holds its limit."""
    places = [line.split(":", 2)[1:] for line in own.splitlines()]
    for controllers, path in places:
        if "memory" in controllers.split(","):
            return root / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    unified = next(path for controllers, path in places if not controllers)
    return root / unified.lstrip("/"), "memory.max"


@contextmanager
def host_memory_cap(
    nbytes: int | None,
    root: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> Iterator[None]:
    """Hold this process and all that it starts to `nbytes` of host memory, page cache included.

    By a cgroup inside this process's own, which only root may make. Raises HeadraceError.
    """
    if nbytes is None:
        yield
        return
    parent, limit = memory_cgroup(own.read_text(), root)
    group = parent / f"headrace-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(nbytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise HeadraceError(f"cannot cap host memory by {group}: {error}") from error
    try:
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        try:
            group.rmdir()
        except OSError as error:
            print(f"{group} is left behind ({error}): a process in it has not ended")
