"""NVML's answers, of a fake with recorded values: no GPU is needed."""

from types import SimpleNamespace

import pytest
from fake_nvml import GIB, UUID, FakeNvml, NVMLError

from headrace.runtime.nvml import process_bytes, read_gpus
from headrace.scheduler.errors import HeadraceError


def test_a_gpu_is_read() -> None:
    nvml = FakeNvml(count=2)
    found = read_gpus(nvml)
    assert (found.driver, found.cuda, len(found.devices)) == ("580.95.05", (13, 0), 2)
    gpu = found.devices[1]
    assert (gpu.index, gpu.name, gpu.uuid, gpu.memory) == (1, "NVIDIA H200", UUID, 140 * GIB)
    assert (gpu.capability, gpu.ecc, gpu.ecc_errors) == ((9, 0), True, 0)
    assert (gpu.pcie, gpu.max_pcie, gpu.power_limit) == ((1, 16), (5, 16), 700.0)
    assert gpu.slowed_by == ()
    assert nvml.open == 0


def test_reasons_for_low_clocks_have_names() -> None:
    bits = 0x1 | 0x4 | 0x40 | 0x100  # idle and the display are no reasons
    [gpu] = read_gpus(FakeNvml(nvmlDeviceGetCurrentClocksEventReasons=bits)).devices
    assert gpu.slowed_by == ("power cap", "hardware thermal slowdown")


def test_what_a_gpu_does_not_tell_is_none() -> None:
    no = NVMLError("Not Supported")
    silent = FakeNvml(
        nvmlDeviceGetEccMode=no,
        nvmlDeviceGetPowerUsage=no,
        nvmlDeviceGetMaxPcieLinkWidth=no,
        nvmlDeviceGetRemappedRows=no,
    )
    [gpu] = read_gpus(silent).devices
    assert gpu.ecc is gpu.power is gpu.max_pcie is gpu.rows_remapped is None
    assert gpu.pcie == (1, 16)


def test_a_machine_without_a_driver() -> None:
    class Absent(FakeNvml):
        def nvmlInit(self) -> None:
            raise NVMLError("NVML Shared Library Not Found")

    with pytest.raises(HeadraceError, match="NVML does not start: NVML Shared Library Not Found"):
        read_gpus(Absent())


def test_memory_of_a_process() -> None:
    processes = [
        SimpleNamespace(pid=7, usedGpuMemory=3 * GIB),
        SimpleNamespace(pid=8, usedGpuMemory=None),
    ]
    nvml = FakeNvml(nvmlDeviceGetComputeRunningProcesses=processes)
    assert process_bytes(UUID, 7, nvml) == 3 * GIB
    assert process_bytes(UUID, 8, nvml) is None  # a driver that does not tell
    assert process_bytes(UUID, 9, nvml) is None  # a container with ids of its own
    with pytest.raises(HeadraceError, match="Not Found"):
        process_bytes("GPU-0", 7, nvml)
