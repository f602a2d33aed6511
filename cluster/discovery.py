"""What a process finds where it runs, on the drive of the store that it can read there, too."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from headrace.scheduler.inputs import DeviceProfile

MODEL_CODE_BYTES = 200 << 20
"""What importing models' code takes (transformers, bitsandbytes and parts of torch): a stage on a CPU
grew from 243 to 451 MB."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """Speeds, and memory in bytes; `process` is what the process takes itself. Processes of one `node` share its
    memory and its drive, and need no network."""

    node: str
    device_free: int
    host_free: int
    process: int
    cores: int
    profile: DeviceProfile


def discover(device: str, store: str) -> Discovery:
    """Look at the device, the memory and the drive. Seconds the first time, then remembered.

    Models' code is counted as if it were in memory: a stage imports it while it reads weights.
    """
    import torch

    from headrace.runtime.probe import probe_device

    profile = probe_device(torch.device(device), Path(store))
    host_free = psutil.virtual_memory().available
    imported = "headrace.runtime.model" in sys.modules
    cuda = device.startswith("cuda")
    return Discovery(
        node=os.uname().nodename,
        device_free=torch.cuda.mem_get_info(device)[0] if cuda else host_free,
        host_free=host_free,
        process=psutil.Process().memory_info().rss + (0 if imported else MODEL_CODE_BYTES),
        cores=len(os.sched_getaffinity(0)),
        profile=profile,
    )
