"""What this machine can do: its drive by each way of reading, links, memory, arithmetic, hops."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from headrace.cluster.bench.hops import hop_actors, measure_call, measure_hop
from headrace.cluster.bench.speeds import COPY_BYTES, CPU, copy_gbps, places, read_gbps
from headrace.runtime.dtypes import name_of
from headrace.runtime.manifest import ALIGN_BLOCK, Block
from headrace.runtime.probe import all_cores, matmul_tflops, memory_gbps
from headrace.runtime.streaming.storage import (
    BufferedStorage,
    DirectStorage,
    KvikioStorage,
    Storage,
)
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

BLOCK_BYTES = 128 << 20
MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement: `value` in `unit`, or None with the reason in `note`."""

    what: str
    where: str
    value: float | None
    unit: str
    note: str = ""


@contextmanager
def random_blocks(directory: Path, count: int, nbytes: int) -> Iterator[list[Block]]:
    """`count` files of `nbytes` random bytes in `directory`, on the drive and gone at the end.

    Raises HeadraceError when there is no room.
    """
    free = shutil.disk_usage(directory).free
    if count * nbytes > free:
        raise HeadraceError(
            f"{directory} has {format_size(free)} free and the files to read take "
            f"{format_size(count * nbytes)}: name another --directory or a smaller --size"
        )
    with TemporaryDirectory(prefix="headrace-bench-", dir=directory) as folder:
        yield [_random_block(Path(folder) / f"block-{i}", nbytes) for i in range(count)]


def _random_block(file: Path, nbytes: int) -> Block:
    words = torch.randint(-(2**31), 2**31, ((nbytes + ALIGN_BLOCK) // 4,), dtype=torch.int32)
    with file.open("wb") as opened:
        words.numpy().tofile(opened)
        os.fsync(opened.fileno())  # a dirty page cannot leave the page cache
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Block(file.name, file, ALIGN_BLOCK, nbytes, "", {})


def measure_drive(directory: Path, device: str, nbytes: int) -> Iterator[Reading]:
    """Reads `nbytes` of files by each way there is, to host memory and to the first GPU."""
    ways: dict[str, Callable[[torch.device], Storage]] = {
        "direct": DirectStorage,
        "buffered": BufferedStorage,
        "kvikio": KvikioStorage,
    }
    best = places(device, 1)[0]
    size = min(BLOCK_BYTES, nbytes // ALIGN_BLOCK * ALIGN_BLOCK)
    if not size:
        raise HeadraceError(f"--size {nbytes} is too small to read: give 1MiB at least")
    with random_blocks(directory, nbytes // size, size) as blocks:
        for name, opened in ways.items():
            for target in dict.fromkeys([best] if name == "kvikio" else [CPU, best]):
                where = f"{name} to {'host' if target == CPU else 'GPU 0'}"
                try:
                    with closing(opened(target)) as storage:
                        speed = read_gbps(storage, blocks, target)
                except HeadraceError as error:
                    yield Reading("drive", where, None, "GB/s", str(error))
                else:
                    yield Reading("drive", where, speed, "GB/s")


def measure_devices(device: str) -> Iterator[Reading]:
    """Each device's link, memory and arithmetic, and all links at once."""
    count = torch.cuda.device_count() if device == "cuda" else 1
    where = places(device, count)
    with all_cores():
        for place in where:
            name = f"GPU {place.index}" if device == "cuda" else "CPU"
            copied = "pinned host memory to device" if device == "cuda" else "host memory copy"
            yield Reading(copied, name, copy_gbps([place], COPY_BYTES), "GB/s")
            yield Reading("device memory", name, memory_gbps(place), "GB/s", "read and written")
            for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
                kind = name_of(dtype)
                yield Reading(f"matmul {kind}", name, matmul_tflops(place, dtype), "TFLOP/s")
        if count > 1:
            together = f"all {count} GPUs at once"
            rate = copy_gbps(where, COPY_BYTES)
            yield Reading("pinned host memory to device", together, rate, "GB/s", "each")


def measure_processes(device: str) -> Iterator[Reading]:
    """A Ray call, and hops by Gloo and, between two GPUs, by NCCL."""
    kinds = {"cpu": "Gloo"}
    if device == "cuda" and torch.cuda.device_count() > 1:
        kinds["cuda"] = "NCCL"
    for kind, name in kinds.items():
        with hop_actors(kind) as actors:
            if kind == "cpu":
                call = measure_call(actors) * MICRO
                yield Reading("Ray call", "actor on this machine", call, "us")
            hop = measure_hop(actors)
        yield Reading("hop", name, hop.seconds * MICRO, "us", "16 KiB, one way")
        yield Reading("hop", name, hop.gbps, "GB/s", "what 8 MiB add")


def measure_machine(directory: Path, device: str, nbytes: int) -> Iterator[Reading]:
    """Everything, in the order of a table. Raises HeadraceError."""
    if not directory.is_dir():
        raise HeadraceError(f"--directory {directory} is not a directory: make it first")
    yield from measure_drive(directory, device, nbytes)
    yield from measure_devices(device)
    yield from measure_processes(device)
