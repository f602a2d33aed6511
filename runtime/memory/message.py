"""What a process answers with when it is asked for its memory. Light to import: a driver has no torch yet."""

from dataclasses import dataclass

from headrace.runtime.memory.process import ProcessMemory


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes that a stage holds under a name.

    `nbytes` are those of the tensors, each once; `resident` those of their pages that are in RAM, 0 on a
    CUDA device, where all of them are in memory. `device`: they are in a CUDA device's memory.
    """

    name: str
    nbytes: int
    resident: int
    device: bool = False


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one CUDA device. `reserved` is what torch took of it, `allocated` what of that is in tensors,
    their peaks those since peaks began anew. `graphs` are reserved for CUDA graphs alone. `process` is all that
    NVML counts for this process, None where it does not, for the `reason`."""

    name: str
    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    graphs: int
    process: int | None
    reason: str


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
        """Anonymous memory that is no part's and no thread's stack: the interpreter's, and libraries' data."""
        return self.process.anonymous - self.held - self.process.stacks
