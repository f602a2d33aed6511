"""NVML as nvidia-ml-py offers it, with values as its documentation has them: an H200 in a good state, and changes to that."""

from types import SimpleNamespace
from typing import Any

GIB = 1 << 30
UUID = "GPU-6a3b1c52-9f0e-4c1d-8e57-0d2f4b9a7c11"


class NVMLError(Exception):
    """What pynvml raises."""


HEALTHY: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetUUID": UUID,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=140 * GIB, free=139 * GIB, used=GIB),
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:0F:00.0"),
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
    "nvmlDeviceGetClockInfo": 345,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x1,  # idle
    "nvmlDeviceGetPowerUsage": 76_512,
    "nvmlDeviceGetPowerManagementLimit": 700_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetTemperature": 31,
    "nvmlDeviceGetCurrPcieLinkGeneration": 1,
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetComputeRunningProcesses": [],
}


class FakeNvml:
    """`changes` are other answers of the one device; an NVMLError among them is raised."""

    NVMLError = NVMLError

    def __init__(
        self, cuda: int = 13000, driver: str = "580.95.05", count: int = 1, **changes: Any
    ):
        self.answers = {**HEALTHY, **changes}
        self._cuda, self._driver, self._count = cuda, driver, count
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._driver

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self._cuda

    def nvmlDeviceGetCount(self) -> int:
        return self._count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != UUID:
            raise NVMLError("Not Found")
        return 0

    def __getattr__(self, name: str) -> Any:
        def answer(handle: int, *_: int) -> Any:
            assert self.open and handle in range(self._count)
            found = self.answers[name]
            if isinstance(found, NVMLError):
                raise found
            return found

        return answer
