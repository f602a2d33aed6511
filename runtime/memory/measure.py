"""Measures this process and what it holds."""

from collections.abc import Iterable

import torch

from headrace.runtime.memory import cuda
from headrace.runtime.memory.held import Holding, parts_of
from headrace.runtime.memory.message import Measured
from headrace.runtime.memory.process import measure_process, reset_peak


def measure(holdings: Iterable[Holding] = (), device: torch.device | None = None) -> Measured:
    """Raises OSError where /proc/self cannot be read. On CUDA nothing is computed meanwhile."""
    parts = parts_of(holdings)
    on_cuda = device is not None and device.type == "cuda"
    found = cuda.measure_device(device) if device is not None and on_cuda else None
    return Measured(measure_process(), parts, found)


def reset_peaks(device: torch.device) -> None:
    """Have peaks begin anew."""
    reset_peak()
    if device.type == "cuda":
        cuda.reset_peak(device)
