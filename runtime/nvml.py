"""What NVIDIA's management library (NVML) says of GPUs. It opens no CUDA context and takes no memory there.

Every value that a device or its driver does not tell is None. `Library` is the part of nvidia-ml-py's module
`pynvml` that is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from headrace.scheduler.errors import HeadraceError

T = TypeVar("T")

ECC_UNCORRECTED, ECC_VOLATILE = 1, 0
CLOCK_SM, TEMPERATURE_GPU = 1, 0
"""Constants of nvml.h."""

REASONS = {
    0x0000000000000004: "power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "power brake",
}
"""Of nvmlClocksEventReasons: those that take clocks away under load. Idling and settings of the user do not."""


class Library(Protocol):
    """pynvml, or what behaves like it. Its functions raise NVMLError."""

    NVMLError: Any

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device: memory in bytes, clocks in MHz, power in W, temperature in C, PCIe as (generation, lanes)."""

    index: int
    name: str
    uuid: str
    bus: str
    memory: int
    free: int
    capability: tuple[int, int] | None
    ecc: bool | None
    ecc_errors: int | None
    rows_remapped: tuple[int, int, bool, bool] | None
    clock: int | None
    max_clock: int | None
    slowed_by: tuple[str, ...] | None
    power: float | None
    power_limit: float | None
    default_power_limit: float | None
    temperature: int | None
    pcie: tuple[int, int] | None
    max_pcie: tuple[int, int] | None
    persistent: bool | None


@dataclass(frozen=True, slots=True)
class Gpus:
    """The driver's version, the newest CUDA that it can run, as (major, minor), and the devices."""

    driver: str
    cuda: tuple[int, int]
    devices: tuple[Gpu, ...]


@contextmanager
def opened(library: Library | None = None) -> Iterator[Library]:
    """NVML for the time of the block. HeadraceError when it cannot be had: no driver, or no such library."""
    if library is None:
        library = _imported()
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        raise HeadraceError(f"NVML does not start: {error}") from error
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _imported() -> Library:
    try:
        import pynvml
    except ImportError as error:
        raise HeadraceError(f"{error}: pip install nvidia-ml-py") from error
    found: Library = pynvml
    return found


def read_gpus(library: Library | None = None) -> Gpus:
    """All of this machine's GPUs. HeadraceError without NVML."""
    with opened(library) as nvml:
        try:
            cuda = nvml.nvmlSystemGetCudaDriverVersion()
            driver, count = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlDeviceGetCount()
            devices = tuple(_gpu(nvml, i) for i in range(count))
        except nvml.NVMLError as error:
            raise HeadraceError(f"NVML fails: {error}") from error
    return Gpus(driver, (cuda // 1000, cuda % 1000 // 10), devices)


def _gpu(nvml: Library, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)

    def ask(name: str, *arguments: object, of: Callable[[Any], T]) -> T | None:
        try:
            return of(getattr(nvml, name)(handle, *arguments))
        except nvml.NVMLError:
            return None

    def pcie(which: str) -> tuple[int, int] | None:
        generation = ask(f"nvmlDeviceGet{which}PcieLinkGeneration", of=int)
        width = ask(f"nvmlDeviceGet{which}PcieLinkWidth", of=int)
        return None if generation is None or width is None else (generation, width)

    return Gpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        bus=ask("nvmlDeviceGetPciInfo", of=lambda info: str(info.busId)) or "",
        memory=int(memory.total),
        free=int(memory.free),
        capability=ask("nvmlDeviceGetCudaComputeCapability", of=_pair),
        ecc=ask("nvmlDeviceGetEccMode", of=lambda modes: bool(modes[0])),
        ecc_errors=ask("nvmlDeviceGetTotalEccErrors", ECC_UNCORRECTED, ECC_VOLATILE, of=int),
        rows_remapped=ask("nvmlDeviceGetRemappedRows", of=_remapped),
        clock=ask("nvmlDeviceGetClockInfo", CLOCK_SM, of=int),
        max_clock=ask("nvmlDeviceGetMaxClockInfo", CLOCK_SM, of=int),
        slowed_by=ask("nvmlDeviceGetCurrentClocksEventReasons", of=_reasons),
        power=ask("nvmlDeviceGetPowerUsage", of=_watts),
        power_limit=ask("nvmlDeviceGetPowerManagementLimit", of=_watts),
        default_power_limit=ask("nvmlDeviceGetPowerManagementDefaultLimit", of=_watts),
        temperature=ask("nvmlDeviceGetTemperature", TEMPERATURE_GPU, of=int),
        pcie=pcie("Curr"),
        max_pcie=pcie("Max"),
        persistent=ask("nvmlDeviceGetPersistenceMode", of=bool),
    )


def _pair(value: Any) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def _remapped(rows: Any) -> tuple[int, int, bool, bool]:
    """(corrected, uncorrected, pending, failed)."""
    return int(rows[0]), int(rows[1]), bool(rows[2]), bool(rows[3])


def _watts(milliwatts: Any) -> float:
    return int(milliwatts) / 1000


def _reasons(bits: Any) -> tuple[str, ...]:
    return tuple(name for bit, name in REASONS.items() if int(bits) & bit)


def process_bytes(uuid: str, pid: int, library: Library | None = None) -> int | None:
    """Memory of the GPU with that UUID that a process has; None where NVML does not tell, as in a container
    with process ids of its own. HeadraceError without NVML."""
    with opened(library) as nvml:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError as error:
            raise HeadraceError(f"NVML fails: {error}") from error
        for process in processes:
            if process.pid == pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    return None
