"""What calibrating takes where a model fits nowhere: seconds a layer, and most memory of device and host.

    python benchmarks/calibration.py FOLDER --shape 70b --layers 20 --device-memory 12GiB --host-memory 16GB

Writes a bf16 checkpoint of random weights to FOLDER (38 GB of this one) and leaves it there, makes a store of it,
rounded by random tokens, and deletes that. PyTorch's allocator holds the device's memory, and a cgroup,
which only root may make, the host's: its page cache counts, too, but not the checkpoint's where FOLDER is in /dev/shm.
"""

import argparse
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args

import torch

from headrace.cluster.bench.memory_cap import host_memory_cap
from headrace.cluster.bench.random_store import write_checkpoint
from headrace.cluster.bench.shapes import SHAPES, config_of
from headrace.cluster.cli.sizes import parse_size
from headrace.runtime.calibration.calibrate import Calibration, convert_calibrated
from headrace.runtime.calibration.encoding import CALIBRATED, Method
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.sizes import format_size


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the checkpoint")
    parser.add_argument("--stores", type=Path, help="for the store; by default, FOLDER")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--format", choices=CALIBRATED, default="int4")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--method", choices=get_args(Method), default="gptq")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device-memory", type=parse_size)
    parser.add_argument("--host-memory", type=parse_size)
    return parser.parse_args()


def main() -> None:
    given = parse()
    config = config_of(given.shape, given.layers)
    layers = config["num_hidden_layers"]
    source = given.folder / f"{given.shape}-{layers}-checkpoint"
    dest = (given.stores or given.folder) / f"{given.shape}-{layers}-{given.method}"
    write_checkpoint(source, config)
    random = torch.Generator().manual_seed(0)
    size = given.tokens // given.context, given.context
    tokens = torch.randint(config["vocab_size"], size, generator=random)
    device = torch.device(given.device)
    if device.type == "cuda" and given.device_memory is not None:
        share = given.device_memory / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(share)
    calibration = Calibration(tokens, "random", given.method, device, given.device_memory)
    run: Callable[..., Store] = partial(convert, format=given.format, group_size=given.group_size)
    began = time.monotonic()
    try:
        with host_memory_cap(given.host_memory):
            store, tally = convert_calibrated(source, dest, calibration, run)
        ends = sorted(block.file.stat().st_mtime for block in store.layers)
    finally:
        shutil.rmtree(dest, ignore_errors=True)
    seconds = [b - a for a, b in pairwise(ends)]
    each = (
        f"{statistics.median(seconds):.1f} s a layer ({max(seconds):.1f} at most), "
        if seconds
        else ""
    )
    print(f"{layers} layers of {given.shape}, {tokens.numel():,} tokens, {dict(tally.counts)}")
    print(f"{each}{time.monotonic() - began:.0f} s in all, ends included")
    if device.type == "cuda":
        print(f"PyTorch took at most {format_size(torch.cuda.max_memory_reserved())} of the device")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(
        f"this process had at most {format_size(most)} in host memory, what it read of mapped files with it"
    )


if __name__ == "__main__":
    main()
