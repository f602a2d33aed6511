"""What share of the bound the streamer reaches: layers of random bytes, a compute of given length.

    python benchmarks/streamer.py --device cuda --tier host --layers 16 --layer-mib 480 --slots 3
    python benchmarks/streamer.py --device cuda --tier nvme --directory /mnt/nvme --compute-ms 5

Prints one JSON object. `bound_gbps` is measured in the same process: copies back to back from
pinned memory (host tier), or loads back to back from the same files (nvme tier). `share` is
max(bytes / bound, compute) over the seconds that a pass took.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from headrace.runtime.loads import Storage
from headrace.runtime.storage import choose_storage
from headrace.runtime.store import Block
from headrace.runtime.streamer import Streamer
from headrace.runtime.tiers import HostTier, device_bytes
from headrace.scheduler.placement import Tier

PAGE = 4096


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tier", choices=["nvme", "host"], default="host")
    parser.add_argument("--storage", default="auto")
    parser.add_argument("--directory", type=Path, help="where the files go (default: $TMPDIR)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layer-mib", type=int, default=64)
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--compute-ms", type=float, default=1.0, help="per layer")
    parser.add_argument("--passes", type=int, default=4)
    return parser.parse_args()


@contextmanager
def random_blocks(directory: Path | None, layers: int, nbytes: int) -> Iterator[dict[int, Block]]:
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-", dir=directory))
    try:
        blocks = {}
        for layer in range(layers):
            file = folder / f"layer-{layer:05}.safetensors"
            data = torch.randint(-(2**62), 2**62, ((nbytes + PAGE) // 8,), dtype=torch.int64)
            with file.open("wb") as opened:
                data.numpy().tofile(opened)
                os.fsync(opened.fileno())  # a dirty page cannot leave the page cache
            blocks[layer] = Block(file.stem, file, PAGE, nbytes, "", {})
        yield blocks
    finally:
        shutil.rmtree(folder)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy(device: torch.device, milliseconds: float) -> Callable[[], None]:
    """A compute of the given length: a spinning kernel on CUDA, a sleep on a CPU."""
    if device.type != "cuda":
        return lambda: time.sleep(milliseconds / 1e3)
    cycles = 100_000_000
    torch.cuda._sleep(cycles)
    synchronize(device)
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    synchronize(device)
    per_ms = cycles / (time.perf_counter() - start) / 1e3
    return lambda: torch.cuda._sleep(int(milliseconds * per_ms))


def measured_bound(
    tier: str, blocks: dict[int, Block], storage: Storage, device: torch.device
) -> float:
    """Bytes a second with nothing else going on, two destinations in turn."""
    nbytes = blocks[0].nbytes
    dests = [device_bytes(nbytes, device).fill_(0) for _ in range(2)]
    if tier == "nvme":
        start = time.perf_counter()
        loads = [
            storage.load(block.file, block.data_offset, dests[i % 2]) for i, block in blocks.items()
        ]
        for load in loads:
            load.wait()
        synchronize(device)
        return nbytes * len(blocks) / (time.perf_counter() - start)
    with HostTier({0: blocks[0]}, storage, device) as host:
        host.wait()
        host.load(0, dests[0]).wait()
        synchronize(device)
        start = time.perf_counter()
        loads = [host.load(0, dests[i % 2]) for i in range(8)]
        for load in loads:
            load.wait()
        synchronize(device)
        return nbytes * 8 / (time.perf_counter() - start)


def run(arguments: argparse.Namespace, blocks: dict[int, Block], device: torch.device) -> None:
    first = blocks[0]
    storage = choose_storage(device, first.file, first.data_offset, first.nbytes, arguments.storage)
    compute = busy(device, arguments.compute_ms)
    bound = measured_bound(arguments.tier, blocks, storage, device)
    with Streamer(
        visits=[[layer] for layer in blocks],
        blocks=blocks,
        tiers=dict.fromkeys(blocks, Tier(arguments.tier)),
        storage=storage,
        device=device,
        ring_slots=arguments.slots,
        slot_bytes=first.nbytes,
    ) as streamer:
        streamer.wait_host_tier()
        one_pass(streamer, len(blocks), compute)
        synchronize(device)
        streamer.take_counters()
        start = time.perf_counter()
        for _ in range(arguments.passes):
            one_pass(streamer, len(blocks), compute)
        synchronize(device)
        seconds = (time.perf_counter() - start) / arguments.passes
        waited = streamer.take_counters().wait_seconds / arguments.passes
    nbytes = first.nbytes * len(blocks)
    floor = max(nbytes / bound, arguments.compute_ms / 1e3 * len(blocks))
    result = {
        "device": str(device),
        "tier": arguments.tier,
        "storage": storage.name,
        "bytes_a_pass": nbytes,
        "seconds_a_pass": round(seconds, 5),
        "seconds_waited_a_pass": round(waited, 5),
        "gbps": round(nbytes / seconds / 1e9, 2),
        "bound_gbps": round(bound / 1e9, 2),
        "share": round(floor / seconds, 3),
    }
    print(json.dumps(result))
    storage.close()


def one_pass(streamer: Streamer, visits: int, compute: Callable[[], None]) -> None:
    for position in range(visits):
        with streamer.hold(position):
            compute()


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.INFO)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext()
    with (
        stream,
        random_blocks(arguments.directory, arguments.layers, arguments.layer_mib << 20) as blocks,
    ):
        run(arguments, blocks, device)


if __name__ == "__main__":
    main()
