"""What torch's allocator and NVML say of a CUDA device's memory."""

import os

import torch

from headrace.runtime import nvml
from headrace.runtime.memory.message import DeviceMemory
from headrace.scheduler.errors import HeadraceError


def measure_device(device: torch.device) -> DeviceMemory:
    """Takes a moment: nothing may be computed meanwhile."""
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    properties = torch.cuda.get_device_properties(device)
    process, reason = _process_bytes(f"GPU-{properties.uuid}")
    return DeviceMemory(
        name=properties.name,
        allocated=stats["allocated_bytes.all.current"],
        reserved=stats["reserved_bytes.all.current"],
        peak_allocated=stats["allocated_bytes.all.peak"],
        peak_reserved=stats["reserved_bytes.all.peak"],
        graphs=_graph_bytes(device),
        process=process,
        reason=reason,
    )


def _process_bytes(uuid: str) -> tuple[int | None, str]:
    try:
        found = nvml.process_bytes(uuid, os.getpid())
    except HeadraceError as error:
        return None, str(error)
    return found, "" if found is not None else "NVML does not see this process by its id"


def _graph_bytes(device: torch.device) -> int:
    """Segments of pools other than the common one, which only graphs have."""
    segments = torch.cuda.memory_snapshot()
    return sum(
        one["total_size"]
        for one in segments
        if one["device"] == device.index and tuple(one["segment_pool_id"]) != (0, 0)
    )


def reset_peak(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device)
