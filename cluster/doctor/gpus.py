"""GPUs as NVML sees them, and whether this torch can use them."""

from collections.abc import Iterator

from headrace.cluster.doctor.finding import (
    Finding,
    NotChecked,
    ok,
    problem,
    run_checks,
    unchecked,
    warn,
)
from headrace.runtime.nvml import Gpu, Gpus, Library, read_gpus
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

AREA = "GPU"
LEAST_CAPABILITY = (7, 5)
"""Turing: what bitsandbytes' 4-bit kernels and Triton need."""

BF16_CAPABILITY = (8, 0)
HOT = 85
"""Degrees Celsius from which GPUs begin to slow down."""


def gpus(library: Library | None = None) -> Iterator[Finding]:
    """All of this machine's. `library` stands in for nvidia-ml-py."""
    try:
        found = read_gpus(library)
    except HeadraceError as error:
        yield from _without_nvml(str(error))
        return
    if not found.devices:
        yield from _without_nvml(f"driver {found.driver} has no GPU")
        return
    checks = [("driver", lambda: _driver(found))]
    yield from run_checks(AREA, checks)
    for gpu in found.devices:
        yield from device(gpu)


def _without_nvml(why: str) -> Iterator[Finding]:
    """A machine without GPUs is in order, unless torch sees one."""
    import torch

    if torch.cuda.is_available():
        yield warn(
            AREA,
            "NVML",
            f"torch sees {torch.cuda.device_count()} GPUs, but {why}",
            "mount the driver's libnvidia-ml.so.1 into the container (--gpus all does)",
        )
    else:
        yield unchecked(AREA, "GPUs", f"none here ({why}); stages compute on the CPU")


def _driver(found: Gpus) -> Iterator[Finding]:
    """The driver has to know the CUDA that torch was built for: of its major version, any minor."""
    import torch

    has = f"driver {found.driver}, CUDA up to {found.cuda[0]}.{found.cuda[1]}"
    built = torch.version.cuda
    if built is None:
        yield problem(
            AREA,
            "driver",
            f"{has}; this torch ({torch.__version__}) was built for CPUs only",
            "pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
        return
    major, minor = (int(part) for part in built.split(".")[:2])
    text = f"{has}; torch {torch.__version__} was built for {built}"
    if found.cuda[0] < major:
        yield problem(
            AREA,
            "driver",
            text,
            f"install a driver for CUDA {major}, or a torch that was built for CUDA {found.cuda[0]}",
        )
    elif found.cuda < (major, minor):
        yield warn(
            AREA,
            "driver",
            f"{text}: it runs, but kernels that are compiled here may not",
            f"install a driver for CUDA {built} or later",
        )
    else:
        yield ok(AREA, "driver", text)


def device(gpu: Gpu) -> Iterator[Finding]:
    """One GPU's findings."""
    area = f"{AREA} {gpu.index}"
    yield ok(
        area, "name", f"{gpu.name}, {format_size(gpu.memory)}, {format_size(gpu.free)} of it free"
    )
    checks = [
        ("compute capability", lambda: _capability(area, gpu)),
        ("ECC", lambda: _ecc(area, gpu)),
        ("clocks", lambda: _clocks(area, gpu)),
        ("power", lambda: _power(area, gpu)),
        ("temperature", lambda: _temperature(area, gpu)),
        ("PCIe", lambda: _pcie(area, gpu)),
        ("persistence", lambda: _persistence(area, gpu)),
    ]
    yield from run_checks(area, checks)


def _capability(area: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.capability is None:
        raise NotChecked("the driver does not tell")
    text = f"{gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability < LEAST_CAPABILITY:
        yield problem(
            area, "compute capability", text, "use a GPU of capability 7.5 (Turing) or later"
        )
    elif gpu.capability < BF16_CAPABILITY:
        yield warn(
            area, "compute capability", f"{text}: no bf16 arithmetic", "run with --dtype float16"
        )
    else:
        yield ok(area, "compute capability", text)


def _ecc(area: str, gpu: Gpu) -> Iterator[Finding]:
    rows = gpu.rows_remapped
    if rows is not None and rows[3]:
        yield problem(area, "ECC", "a row of memory could not be remapped", "have the GPU replaced")
    elif rows is not None and rows[2]:
        yield warn(
            area,
            "ECC",
            "a row of memory waits to be remapped",
            "reset the GPU when nothing runs: nvidia-smi --gpu-reset -i " + str(gpu.index),
        )
    elif gpu.ecc_errors:
        yield problem(
            area,
            "ECC",
            f"{gpu.ecc_errors} uncorrected errors since the driver was loaded",
            "stop using this GPU; see nvidia-smi -q -d ECC",
        )
    elif gpu.ecc is None:
        yield ok(area, "ECC", "this GPU has none")
    else:
        yield ok(area, "ECC", "on, no uncorrected errors" if gpu.ecc else "off")


def _clocks(area: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.slowed_by is None:
        raise NotChecked("the driver does not tell")
    text = f"{gpu.clock} of {gpu.max_clock} MHz"
    if gpu.slowed_by:
        yield warn(
            area,
            "clocks",
            f"{text}, held down by {', '.join(gpu.slowed_by)}",
            "look at cooling, power supply and power limit: nvidia-smi -q -d PERFORMANCE,POWER",
        )
    else:
        yield ok(area, "clocks", f"{text}, nothing holds them down")


def _power(area: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.power_limit is None:
        raise NotChecked("the driver does not tell")
    text = f"limit {gpu.power_limit:.0f} W"
    if gpu.default_power_limit is not None and gpu.power_limit < gpu.default_power_limit:
        yield warn(
            area,
            "power",
            f"{text}, below the default of {gpu.default_power_limit:.0f} W",
            f"nvidia-smi -i {gpu.index} -pl {gpu.default_power_limit:.0f}",
        )
    else:
        yield ok(area, "power", text if gpu.power is None else f"{text}, {gpu.power:.0f} W now")


def _temperature(area: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.temperature is None:
        raise NotChecked("the driver does not tell")
    if gpu.temperature >= HOT:
        yield warn(area, "temperature", f"{gpu.temperature} C", "look at the cooling")
    else:
        yield ok(area, "temperature", f"{gpu.temperature} C")


def _pcie(area: str, gpu: Gpu) -> Iterator[Finding]:
    """At rest a link falls back to a lower generation, but not to fewer lanes."""
    if gpu.pcie is None or gpu.max_pcie is None:
        raise NotChecked("the driver does not tell")
    now = f"generation {gpu.pcie[0]} x{gpu.pcie[1]}"
    most = f"generation {gpu.max_pcie[0]} x{gpu.max_pcie[1]}"
    if gpu.pcie[1] < gpu.max_pcie[1]:
        yield warn(
            area,
            "PCIe",
            f"{now} of {most}: weights stream that much slower",
            "put the GPU into a slot with all its lanes, and seat it and its riser anew",
        )
    else:
        at_rest = " (it falls back at rest)" if gpu.pcie[0] < gpu.max_pcie[0] else ""
        yield ok(area, "PCIe", f"{now} of {most}{at_rest}")


def _persistence(area: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.persistent is None:
        raise NotChecked("the driver does not tell")
    if gpu.persistent:
        yield ok(area, "persistence", "on")
    else:
        yield warn(
            area,
            "persistence",
            "off: the driver is loaded anew at each start, which takes seconds",
            "sudo systemctl enable --now nvidia-persistenced, or sudo nvidia-smi -pm 1",
        )
