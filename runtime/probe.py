"""What a machine can do, measured once in a few seconds and remembered in a cache file.

The drive is measured on a real file of the store, read only: O_DIRECT reads by a few threads where
the filesystem allows them, else buffered reads of pages dropped from the page cache. Hops are not
measured, since that takes two processes: see HOPS.
"""

import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path

import torch

from headrace.runtime.cold.source import read_origin
from headrace.runtime.product import least_rows
from headrace.scheduler.errors import StoreError
from headrace.scheduler.inputs import DeviceProfile, Kind

log = logging.getLogger(__name__)

VERSION = 4
"""Of the cache file; profiles measured in another way are measured again."""

DISK_SECONDS = 0.6
SECONDS = 0.25
"""How long each of the other measurements goes on."""

CHUNK_BYTES = 4 << 20
SAMPLE_CHUNKS = 16
"""Of a file that is made to be read."""

THREADS = 4

HOPS: dict[Kind, float] = {"cuda": 2e-4, "cpu": 3e-4}
"""Seconds until a small hop has arrived, one way: NCCL on two H200, Gloo on the loopback."""

GRAPH_LAYER_SECONDS = 60e-6
"""What a layer takes beside its bytes and arithmetic, as a CUDA graph of some 60 kernels: a pass of one
sequence through 32 layers of 8B took an H200 4.53 ms, of which 1.2 read weights and 1.3 lay between passes."""

LAYERS, WIDTH = 8, 64
"""Of the model on which a CPU's time for layers is measured: so narrow that it computes nearly nothing."""

GLOO_GBPS = 4.8
"""Gloo on the loopback, from what 3 MiB more take."""


@dataclass(frozen=True, slots=True)
class DiskReading:
    gbps: float
    method: str  # "O_DIRECT" or "buffered"


def probe_device(device: torch.device, path: Path, *, refresh: bool = False) -> DeviceProfile:
    """Speeds of `device` and of the drive that holds `path`, a block file or a store.

    Cached in $XDG_CACHE_HOME/headrace/ by device and filesystem; `refresh` measures again. Raises
    StoreError if there is no file to read. A store that was pulled and has no blocks yet gets a file for
    as long as it is read.
    """
    with _file_to_read(path) as file:
        cache = _cache_file(device, file)
        profile = None if refresh else _load(cache)
        if profile is None:
            profile = _measure(device, file)
            _save(cache, profile)
        return profile


@contextmanager
def _file_to_read(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    files = [file for file in path.glob("*.safetensors") if file.stat().st_size]
    if files:
        yield max(files, key=lambda file: file.stat().st_size)
    elif read_origin(path) is None:
        raise StoreError(f"{path}: no .safetensors file to measure the drive with; is it a store?")
    else:
        with tempfile.NamedTemporaryFile(dir=path, prefix="headrace-probe-", suffix=".tmp") as file:
            for _ in range(SAMPLE_CHUNKS):
                file.write(os.urandom(CHUNK_BYTES))
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)


def _measure(device: torch.device, file: Path) -> DeviceProfile:
    disk = measure_disk(file)
    log.info("drive: %.2f GB/s by %s reads of %s", disk.gbps, disk.method, file)
    if device.type == "cuda":
        profile = _measure_cuda(device, disk)
        torch.cuda.empty_cache()  # what the measurement took is free, and counted as such
    else:
        profile = _measure_cpu(disk)
    log.info("measured %s: %s", _device_name(device), profile)
    return profile


def measure_disk(file: Path, seconds: float = DISK_SECONDS) -> DiskReading:
    """GB/s of reading `file` over and over in chunks by THREADS threads."""
    try:
        return DiskReading(_read_rate(file, os.O_DIRECT, seconds), "O_DIRECT")
    except OSError as error:
        log.info("%s: no O_DIRECT (%s), measuring buffered reads", file, error.strerror)
    try:
        return DiskReading(_read_rate(file, 0, seconds), "buffered")
    except OSError as error:
        raise StoreError(f"{file}: cannot be read: {error.strerror}") from error


def _read_rate(file: Path, flags: int, seconds: float) -> float:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        # Whole chunks only, unless there is just a part of one; an O_DIRECT read may end short.
        chunks = max(1, os.fstat(descriptor).st_size // CHUNK_BYTES)
        if not flags:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        turns = count()
        started = time.perf_counter()

        def read() -> int:
            done = 0
            with mmap.mmap(-1, CHUNK_BYTES) as memory:
                while time.perf_counter() - started < seconds:
                    offset = next(turns) % chunks * CHUNK_BYTES
                    done += os.preadv(descriptor, [memory], offset)
                    if not flags:
                        os.posix_fadvise(descriptor, offset, CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
            return done

        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(read) for _ in range(THREADS)]
            done = sum(future.result() for future in futures)
        return done / (time.perf_counter() - started) / 1e9
    finally:
        os.close(descriptor)


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Products of two square matrices, on the current stream or by all of torch's threads."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    result = torch.empty_like(a)
    return _rate(device, 2.0 * size**3, lambda: torch.mm(a, a, out=result)) / 1e12


def memory_gbps(device: torch.device) -> float:
    """Bytes read and bytes written by copies inside the device's memory (a CPU: host memory)."""
    nbytes = (256 if device.type == "cuda" else 64) << 20  # larger than most caches
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(device, 2.0 * nbytes, lambda: target.copy_(source)) / 1e9


def _rate(device: torch.device, work: float, repeat: Callable[[], object]) -> float:
    """Units of work a second, each `repeat` doing `work` of them.

    A GPU is waited for after several of them, so that its idling in between does not count. Of a CPU
    the fastest one counts: it has other work, now and then, and what is measured is remembered.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if cuda else None

    def several(times: int) -> None:
        for _ in range(times):
            repeat()
        if stream is not None:
            stream.synchronize()

    several(1)
    together = 8 if cuda else 1
    marks = [time.perf_counter()]
    while marks[-1] - marks[0] < SECONDS:
        several(together)
        marks.append(time.perf_counter())
    if cuda:
        return work * together * (len(marks) - 1) / (marks[-1] - marks[0])
    return work / min(b - a for a, b in pairwise(marks))


def layer_seconds() -> float:
    """What a layer of one token takes a CPU beside its bytes and arithmetic: transformers' own code for a
    Llama layer, which stages run, too. A stage imports it in any case."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaModel(config).eval()
    tokens = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        passes = _rate(torch.device("cpu"), 1.0, lambda: model(tokens, use_cache=False))
    return 1.0 / passes / LAYERS


@contextmanager
def all_cores() -> Iterator[None]:
    """torch on all cores that this process may use, whatever it is set to at the moment."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_cpu(disk: DiskReading) -> DeviceProfile:
    """float32, by all cores."""
    cpu = torch.device("cpu")
    with all_cores():
        tflops, moved = matmul_tflops(cpu, torch.float32), memory_gbps(cpu)
    return DeviceProfile(
        kind="cpu",
        nvme_gbps=disk.gbps,
        host_gbps=moved / 2,  # a copy reads and writes
        tflops=tflops,
        hbm_gbps=moved,
        hop_seconds=HOPS["cpu"],
        link_gbps=GLOO_GBPS,
        layer_seconds=layer_seconds(),
        least_rows=least_rows(),
    )


def _measure_cuda(device: torch.device, disk: DiskReading) -> DeviceProfile:
    """bfloat16, on a stream of its own; half a GiB of device memory for a second."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
    with torch.cuda.stream(stream):
        tflops, moved = matmul_tflops(device, torch.bfloat16), memory_gbps(device)
        target = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        pinned = torch.ones(target.nbytes, dtype=torch.uint8, pin_memory=True)
        crossed = _rate(device, target.nbytes, lambda: target.copy_(pinned, non_blocking=True))
    return DeviceProfile(
        kind="cuda",
        nvme_gbps=disk.gbps,
        host_gbps=crossed / 1e9,
        tflops=tflops,
        hbm_gbps=moved,
        hop_seconds=HOPS["cuda"],
        # Without NVLink a hop crosses PCIe; with it, hops are shorter still.
        link_gbps=crossed / 1e9,
        layer_seconds=GRAPH_LAYER_SECONDS,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} x {len(os.sched_getaffinity(0))} threads"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(names, os.uname().machine)


def _cache_file(device: torch.device, file: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    identity = f"{_device_name(device)} {os.uname().nodename} {os.stat(file).st_dev}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Path(base) / "headrace" / f"probe-{digest}.json"


def _load(cache: Path) -> DeviceProfile | None:
    try:
        record = json.loads(cache.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            return None
        profile = DeviceProfile(**record["profile"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: not usable (%s), measuring again", cache, error)
        return None
    log.info("speeds from %s, measured %s", cache, record.get("measured"))
    return profile


def _save(cache: Path, profile: DeviceProfile) -> None:
    """Written whole or not at all. Without a place for it, the next run measures again."""
    measured = time.strftime("%Y-%m-%d %H:%M:%S")
    record = {"version": VERSION, "measured": measured, "profile": asdict(profile)}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(cache) as temporary:
            temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
    except OSError as error:
        log.warning("%s: cannot be written (%s), so the next run measures again", cache, error)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A file that takes the name of `file` when it is written; several processes may do so."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
