"""What a process finds where it runs, and in the store that it can read there."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from headrace.runtime.store import Store
from headrace.scheduler.inputs import DeviceProfile, ModelShape


@dataclass(frozen=True, slots=True)
class Discovery:
    """Sizes of the model, speeds, and memory in bytes; `process` is what the process takes itself."""

    node: str
    device_free: int
    host_free: int
    process: int
    cores: int
    profile: DeviceProfile
    shape: ModelShape


def discover(device: str, store: str, dtype: str) -> Discovery:
    """Look at the device, the memory, the drive and the model, which computes in `dtype`.

    Seconds the first time, then remembered. Imports what a stage runs: its code stays in memory, and
    so is counted.
    """
    from headrace.runtime.probe import probe_device
    from headrace.runtime.shape import model_shape

    profile = probe_device(torch.device(device), Path(store))
    shape = model_shape(Store.open(Path(store)), getattr(torch, dtype))
    host_free = psutil.virtual_memory().available
    cuda = device.startswith("cuda")
    return Discovery(
        node=os.uname().nodename,
        device_free=torch.cuda.mem_get_info(device)[0] if cuda else host_free,
        host_free=host_free,
        process=psutil.Process().memory_info().rss,
        cores=len(os.sched_getaffinity(0)),
        profile=profile,
        shape=shape,
    )
