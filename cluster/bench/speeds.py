"""Bandwidths measured beside a run: what its drive, link, memory and arithmetic could do."""

import time
from collections.abc import Sequence

import torch

from headrace.cluster.bench.hops import Hop
from headrace.runtime.manifest import Block
from headrace.runtime.probe import all_cores, matmul_tflops, memory_gbps
from headrace.runtime.streaming.loads import Load
from headrace.runtime.streaming.storage import BufferedStorage, DirectStorage, Storage
from headrace.runtime.streaming.tiers import AlignedBuffer, device_bytes
from headrace.scheduler.errors import StoreError
from headrace.scheduler.inputs import DeviceProfile

GIGA = 1e9
CPU = torch.device("cpu")
DISK_SECONDS = 8.0
COPY_SECONDS = 0.25
COPY_BYTES = 512 << 20


def places(device: str, count: int) -> list[torch.device]:
    """The devices of `count` stages on this machine; stages on a CPU share one."""
    return [torch.device("cuda", i) for i in range(count)] if device == "cuda" else [CPU]


def measure_profile(
    device: str, stages: int, disk: float, slot_bytes: int, hop: Hop
) -> DeviceProfile:
    """What one stage has to itself, but for the drive and a CPU's cores, which all share.

    `disk` in GB/s and `hop` as measured. The weakest of the devices counts.
    """
    where = places(device, stages)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with all_cores():
        return DeviceProfile(
            kind="cuda" if device == "cuda" else "cpu",
            nvme_gbps=disk,
            host_gbps=copy_gbps(where, min(slot_bytes, COPY_BYTES)),
            tflops=min(matmul_tflops(place, dtype) for place in where),
            hbm_gbps=min(memory_gbps(place) for place in where),
            hop_seconds=hop.seconds,
            link_gbps=hop.gbps,
        )


def disk_gbps(blocks: Sequence[Block], seconds: float = DISK_SECONDS) -> float:
    """Reading these blocks into host memory by O_DIRECT.

    Past the page cache where the filesystem has no O_DIRECT.
    """
    try:
        with DirectStorage(CPU) as direct:
            return read_gbps(direct, blocks, CPU, seconds)
    except StoreError:
        with BufferedStorage(CPU) as buffered:
            return read_gbps(buffered, blocks, CPU, seconds)


def read_gbps(
    storage: Storage, blocks: Sequence[Block], device: torch.device, seconds: float = DISK_SECONDS
) -> float:
    """GB/s of loading blocks to `device`, the next one asked for while one is on its way.

    Ends after the last block or after `seconds`. Raises StoreError.
    """
    dests = [device_bytes(max(b.nbytes for b in blocks), device).fill_(0) for _ in range(2)]
    _synchronize(device)
    started = time.perf_counter()
    done, under_way = 0, list[tuple[Load, int]]()
    for i, block in enumerate(blocks):
        dest = dests[i % 2][: block.nbytes]
        under_way.append((storage.load(block.file, block.data_offset, dest), block.nbytes))
        if len(under_way) == len(dests):
            done += _finish(under_way)
        if time.perf_counter() - started > seconds:
            break
    while under_way:
        done += _finish(under_way)
    _synchronize(device)
    return done / (time.perf_counter() - started) / GIGA


def _finish(under_way: list[tuple[Load, int]]) -> int:
    load, nbytes = under_way.pop(0)
    load.wait()
    return nbytes


def copy_gbps(devices: Sequence[torch.device], nbytes: int) -> float:
    """GB/s into each of the devices at once from pinned memory; on a CPU a plain copy."""
    with AlignedBuffer(nbytes, pinned=devices[0].type == "cuda") as source:
        source.tensor.fill_(1)
        dests = [device_bytes(nbytes, device).fill_(0) for device in devices]

        def copy() -> None:
            for dest in dests:
                dest.copy_(source.tensor, non_blocking=True)

        def wait() -> None:
            for device in devices:
                _synchronize(device)

        copy()
        wait()
        copies, started = 0, time.perf_counter()
        while time.perf_counter() - started < COPY_SECONDS:
            for _ in range(4):
                copy()
            wait()
            copies += 4
        rate = copies * nbytes / (time.perf_counter() - started) / GIGA
    if devices[0].type == "cuda":
        del dests
        torch.cuda.empty_cache()
    return rate


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
