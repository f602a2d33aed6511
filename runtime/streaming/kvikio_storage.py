"""Reads through NVIDIA's kvikio: GPUDirect Storage where the machine has it, else its POSIX path."""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch

from headrace.runtime.memory.held import Holding
from headrace.runtime.streaming.loads import Load, check_extent, queued_work, too_short
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.errors import HeadraceError, StoreError

THREADS = 8
TASK_BYTES = 4 << 20
_GDS_QUESTION = "import kvikio.cufile_driver as d; print(d.get('is_gds_available'))"
_GDS_SECONDS = 20


def gds_available() -> bool:
    """Whether reads can go from the drive to the GPU without host memory.

    cuFile's driver spins for ever on some kernels without modules, hence the files first, a
    process of its own and a deadline; it also writes cufile.log where it starts.
    """
    if not (Path("/proc/driver/nvidia-fs/devcount").exists() and Path("/proc/modules").exists()):
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            answer = subprocess.run(
                [sys.executable, "-c", _GDS_QUESTION],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_GDS_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return answer.stdout.strip().endswith("True")


def _import_kvikio() -> Any:
    try:
        import kvikio
        import kvikio.defaults
    except Exception as error:  # missing CUDA libraries raise more than ImportError
        raise HeadraceError(
            f"storage 'kvikio' cannot be had: importing kvikio failed ({error}); install "
            "headrace[gpu], or use storage 'auto'"
        ) from error
    return kvikio


class KvikioStorage:
    """kvikio's thread pool. Its settings are the process's, so a process opens one of these.

    Raises HeadraceError when kvikio is not installed or the device is not CUDA.
    """

    def __init__(
        self,
        device: torch.device,
        threads: int = THREADS,
        task_bytes: int = TASK_BYTES,
        *,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        if device.type != "cuda":
            raise HeadraceError(
                f"storage 'kvikio' reads into CUDA devices, this stage's is {device}; use "
                "storage 'auto' or 'direct'"
            )
        self._kvikio = _import_kvikio()
        self.gds = gds_available()
        # Never AUTO, which may pick cuFile's own silent fallback.
        mode = self._kvikio.CompatMode.OFF if self.gds else self._kvikio.CompatMode.ON
        self._kvikio.defaults.set(
            {"compat_mode": mode, "num_threads": threads, "task_size": task_bytes}
        )
        self.name = "kvikio-gds" if self.gds else "kvikio-posix"
        self._task_bytes = task_bytes
        self._tracer = tracer
        self._lock = threading.Lock()
        self._files: dict[Path, Any] = {}
        # Two at once: the next load's tasks queue behind the last ones of this load.
        self._loads = ThreadPoolExecutor(2, "headrace-kvikio")

    def load(self, file: Path, offset: int, dest: torch.Tensor) -> Load:
        check_extent(offset, dest)
        after = queued_work(dest.device)
        return _KvikioLoad(file, self._loads.submit(self._read, file, offset, dest, after))

    def _read(
        self, file: Path, offset: int, dest: torch.Tensor, after: torch.cuda.Event | None
    ) -> None:
        if after is not None:
            after.synchronize()
        try:
            # kvikio takes CUDA tensors as they are and host memory through the buffer protocol.
            target = dest if dest.is_cuda else dest.numpy()
            handle = self._open(file)
            with self._tracer.span(Kind.READ, file.stem, nbytes=dest.nbytes):
                count = handle.pread(target, dest.nbytes, offset, self._task_bytes).get()
        except Exception as error:
            raise StoreError(
                f"{file}: reading {dest.nbytes} bytes from byte {offset} failed: {error}"
            ) from error
        if count != dest.nbytes:
            raise too_short(file, offset + count, offset + dest.nbytes)

    def _open(self, file: Path) -> Any:
        with self._lock:
            handle = self._files.get(file)
            if handle is None:
                handle = self._files[file] = self._kvikio.CuFile(file, "r")
            return handle

    def memory(self) -> Iterable[Holding]:
        """Nothing: what kvikio and cuFile hold, only they know."""
        return ()

    def close(self) -> None:
        self._loads.shutdown(cancel_futures=True)
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _KvikioLoad:
    """kvikio returns when the bytes have arrived, so the host's wait is all there is."""

    def __init__(self, file: Path, reading: "Future[None]") -> None:
        self._file = file
        self._reading = reading

    def wait(self) -> None:
        try:
            self._reading.result()
        except CancelledError as error:
            raise StoreError(f"{self._file}: not read, the storage is closed") from error
