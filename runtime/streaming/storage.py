"""Which way bytes leave the disk on this machine: tried on real bytes at start, then settled.

The probe reads one extent of a shard by each way there is, compares hashes of what landed, and
keeps the fastest. What is measured must be what the run will see:

- The page cache is emptied of the extent before a way that goes through it is timed, because a
  cycle of layers larger than the cache never hits it. Only if the caller says how much a pass
  streams, and RAM has room for all of it, is the warm speed the honest one.
- O_DIRECT is kept unless another way is clearly faster: it moves each byte through RAM once.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from headrace.runtime.manifest import ALIGN_BLOCK
from headrace.runtime.streaming.direct import BufferedStorage, DirectStorage, OpenFiles
from headrace.runtime.streaming.kvikio_storage import KvikioStorage
from headrace.runtime.streaming.loads import Load, Storage
from headrace.runtime.streaming.page_cache import available_memory, cached_share
from headrace.runtime.streaming.tiers import device_bytes
from headrace.runtime.trace import NULL_TRACER, Tracer
from headrace.scheduler.errors import HeadraceError, StoreError

__all__ = [
    "BufferedStorage",
    "DirectStorage",
    "KvikioStorage",
    "Load",
    "Storage",
    "choose_storage",
]

log = logging.getLogger(__name__)

PROBE_BYTES = 128 << 20
CLEARLY_FASTER = 1.2
_CACHED_ENOUGH_TO_LIE = 0.1


@dataclass(frozen=True, slots=True)
class _Extent:
    file: Path
    offset: int
    nbytes: int
    xxh3_64: str


@dataclass(frozen=True, slots=True)
class _Trial:
    """One way's speed in bytes a second; `lies` when it was served by a cache the run won't have."""

    name: str
    storage: Storage
    speed: float
    lies: bool


def choose_storage(
    device: torch.device,
    sample_file: Path,
    offset: int,
    nbytes: int,
    requested: str = "auto",
    *,
    streamed_bytes: int | None = None,
    tracer: Tracer = NULL_TRACER,
) -> Storage:
    """The fastest storage that reads bytes of `sample_file` rightly, or the one requested.

    `requested` is "auto", "direct", "buffered" or "kvikio". `streamed_bytes` is what all stages of
    this machine stream from disk in a pass: the page cache counts only if RAM can hold that much.
    Raises HeadraceError when a requested storage cannot be had, StoreError when the sample cannot
    be read or the requested storage reads it wrongly.
    """
    keep_cache = streamed_bytes is not None and streamed_bytes <= available_memory()
    ways: dict[str, Callable[[], Storage]] = {
        "direct": lambda: DirectStorage(device, tracer=tracer),
        "buffered": lambda: BufferedStorage(device, keep_cache=keep_cache, tracer=tracer),
        "kvikio": lambda: KvikioStorage(device, tracer=tracer),
    }
    if requested != "auto" and requested not in ways:
        raise HeadraceError(f"storage {requested!r} is not known; use auto, {', '.join(ways)}")
    before = cached_share(sample_file, offset, nbytes)
    extent = _reference(sample_file, offset, min(nbytes, PROBE_BYTES))
    if requested == "auto":
        trials = _try_each(ways, extent, device, keep_cache)
    else:
        trials = [_try(requested, ways[requested](), extent, device, keep_cache)]
    best = _best(trials)
    for trial in trials:
        if trial is not best:
            trial.storage.close()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the probe's memory belongs to the plan
    _report(best, trials, requested, extent, before, keep_cache)
    return best.storage


def _try_each(
    ways: Mapping[str, Callable[[], Storage]],
    extent: _Extent,
    device: torch.device,
    keep_cache: bool,
) -> list[_Trial]:
    trials = []
    for name, opened in ways.items():
        trial = _try_or_log(name, opened, extent, device, keep_cache)
        if trial is not None:
            trials.append(trial)
    if not trials:
        raise StoreError(f"{extent.file}: no way of reading it works here; the log says why")
    return trials


def _try_or_log(
    name: str,
    opened: Callable[[], Storage],
    extent: _Extent,
    device: torch.device,
    keep_cache: bool,
) -> _Trial | None:
    try:
        return _try(name, opened(), extent, device, keep_cache)
    except StoreError as error:
        log.warning("storage %s is left out: %s", name, error)
    except HeadraceError as error:
        log.info("storage %s is not available: %s", name, error)
    return None


def _try(
    name: str, storage: Storage, extent: _Extent, device: torch.device, keep_cache: bool
) -> _Trial:
    try:
        cached: float | None = 0.0
        if name != "direct" and not keep_cache:
            cached = _evict(extent)
        dest = device_bytes(extent.nbytes, device)
        seconds = _timed_load(storage, extent, dest)
        landed = xxhash.xxh3_64_hexdigest(dest.cpu().numpy().data)
        if landed != extent.xxh3_64:
            raise StoreError(
                f"{extent.file}: storage {storage.name} delivered wrong bytes (xxh3_64 {landed}, "
                f"expected {extent.xxh3_64}); do not use it on this machine"
            )
    except BaseException:
        storage.close()
        raise
    lies = cached is None or cached > _CACHED_ENOUGH_TO_LIE
    return _Trial(name, storage, extent.nbytes / seconds, lies)


def _timed_load(storage: Storage, extent: _Extent, dest: torch.Tensor) -> float:
    """Seconds of a second part, after a first that opens files and pins buffers; both land."""
    warmup = min(extent.nbytes // 4 // ALIGN_BLOCK * ALIGN_BLOCK, extent.nbytes - ALIGN_BLOCK)
    if warmup:
        _load(storage, extent, dest, 0, warmup)
    start = time.perf_counter()
    _load(storage, extent, dest, warmup, extent.nbytes)
    seconds = max(time.perf_counter() - start, 1e-9)
    return seconds * extent.nbytes / (extent.nbytes - warmup)


def _load(storage: Storage, extent: _Extent, dest: torch.Tensor, start: int, end: int) -> None:
    storage.load(extent.file, extent.offset + start, dest[start:end]).wait()
    if dest.is_cuda:
        torch.cuda.current_stream(dest.device).synchronize()


def _best(trials: list[_Trial]) -> _Trial:
    """The fastest of the honest trials; O_DIRECT unless it is clearly beaten."""
    honest = [trial for trial in trials if not trial.lies] or trials
    fastest = max(honest, key=lambda trial: trial.speed)
    direct = next((trial for trial in honest if trial.name == "direct"), fastest)
    return fastest if fastest.speed > CLEARLY_FASTER * direct.speed else direct


def _report(
    best: _Trial,
    trials: list[_Trial],
    requested: str,
    extent: _Extent,
    before: float | None,
    keep_cache: bool,
) -> None:
    figures = ", ".join(
        f"{trial.storage.name} {trial.speed / 1e9:.2f} GB/s"
        + (" (page cache, not counted)" if trial.lies else "")
        for trial in trials
    )
    log.info(
        "storage %s (requested: %s) on %s: %s; %d bytes read and hashed; page cache %s, held %s "
        "of them before the probe",
        best.storage.name,
        requested,
        extent.file.parent,
        figures,
        extent.nbytes,
        "counted: RAM holds a pass" if keep_cache else "emptied before timing",
        "an unknown share" if before is None else f"{before:.0%}",
    )


def _reference(file: Path, offset: int, nbytes: int) -> _Extent:
    """The extent and the hash of its bytes, read the plainest way there is."""
    assert nbytes > 0 and nbytes % ALIGN_BLOCK == 0 and offset % ALIGN_BLOCK == 0
    files = OpenFiles(direct=False, drop_behind=False)
    digest, piece = xxhash.xxh3_64(), bytearray(min(nbytes, 8 << 20))
    try:
        for start in range(0, nbytes, len(piece)):
            view = memoryview(piece)[: nbytes - start]
            files.read(file, offset + start, view)
            digest.update(view)
    finally:
        files.close()
    return _Extent(file, offset, nbytes, digest.hexdigest())


def _evict(extent: _Extent) -> float | None:
    """Drop the extent's clean pages from the cache; the share that is still there."""
    with extent.file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)
    return cached_share(extent.file, extent.offset, extent.nbytes)
