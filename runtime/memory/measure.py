"""A process with what it holds: the message that a stage answers with when it is asked for its memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from headrace.runtime.memory import cuda, process
from headrace.runtime.memory.cuda import DeviceMemory, measure_device
from headrace.runtime.memory.held import Holding, Part, parts_of
from headrace.runtime.memory.process import ProcessMemory, measure_process


@dataclass(frozen=True, slots=True)
class Measured:
    """`parts` are what owners hold; `device` is None of a process that has none but its CPU."""

    process: ProcessMemory
    parts: tuple[Part, ...] = ()
    device: DeviceMemory | None = None

    @property
    def held(self) -> int:
        """Bytes of parts that are in RAM."""
        return sum(part.resident for part in self.parts)

    @property
    def own(self) -> int:
        """Anonymous memory that is no part's and no thread's stack: the interpreter, and libraries' data."""
        return self.process.anonymous - self.held - self.process.stacks


def measure(holdings: Iterable[Holding] = (), device: torch.device | None = None) -> Measured:
    """This process. Raises OSError where /proc/self cannot be read."""
    parts = parts_of(holdings)
    on_cuda = device is not None and device.type == "cuda"
    return Measured(
        measure_process(), parts, measure_device(device) if device is not None and on_cuda else None
    )


def reset_peaks(device: torch.device | None = None) -> None:
    """Have peaks begin anew."""
    process.reset_peak()
    if device is not None and device.type == "cuda":
        cuda.reset_peak(device)
