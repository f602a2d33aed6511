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
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from headrace.cluster.bench.machine import random_blocks
from headrace.cluster.bench.speeds import copy_gbps, read_gbps
from headrace.runtime.manifest import Block
from headrace.runtime.streaming.storage import choose_storage
from headrace.runtime.streaming.streamer import Streamer
from headrace.scheduler.placement import Tier


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


def run(arguments: argparse.Namespace, blocks: dict[int, Block], device: torch.device) -> None:
    first = blocks[0]
    storage = choose_storage(device, first.file, first.data_offset, first.nbytes, arguments.storage)
    compute = busy(device, arguments.compute_ms)
    if arguments.tier == "nvme":
        bound = read_gbps(storage, list(blocks.values()), device)
    else:
        bound = copy_gbps([device], first.nbytes)
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
    floor = max(nbytes / 1e9 / bound, arguments.compute_ms / 1e3 * len(blocks))
    result = {
        "device": str(device),
        "tier": arguments.tier,
        "storage": storage.name,
        "bytes_a_pass": nbytes,
        "seconds_a_pass": round(seconds, 5),
        "seconds_waited_a_pass": round(waited, 5),
        "gbps": round(nbytes / seconds / 1e9, 2),
        "bound_gbps": round(bound, 2),
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
    folder = arguments.directory or Path(tempfile.gettempdir())
    with stream, random_blocks(folder, arguments.layers, arguments.layer_mib << 20) as blocks:
        run(arguments, dict(enumerate(blocks)), device)


if __name__ == "__main__":
    main()
