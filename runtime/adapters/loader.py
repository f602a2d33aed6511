"""Brings adapters to the device's slots beside the passes: from host memory, or from their directories.

Why no row is computed with a half of one. The scheduler lets no slice use a slot from the pass that brings a load
until every stage has reported it. What earlier passes read of the slot they have read when a stage begins that
pass, for it runs passes one after the other and each returns when the device has finished. And a load is reported
when its last byte is there.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from headrace.runtime.adapters.directory import AdapterFiles, Factors, open_adapter
from headrace.runtime.adapters.host import (
    HostAdapter,
    HostAdapters,
    HostFactors,
    nbytes_of,
)
from headrace.runtime.adapters.loads import EndedLoads
from headrace.runtime.adapters.matrices import StageMatrices
from headrace.runtime.adapters.places import AdapterPlaces
from headrace.runtime.memory.held import Holding
from headrace.scheduler.errors import HeadraceError, StoreError
from headrace.scheduler.plan import Adapter, AdapterLoad

log = logging.getLogger(__name__)


class AdapterLoader:
    """One thread that loads adapters into slots of `matrices`, of ranks up to `rank`; `host_bytes` of host memory
    keep those that were loaded last."""

    def __init__(
        self,
        places: AdapterPlaces,
        matrices: StageMatrices,
        *,
        rank: int,
        host_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._places, self._matrices, self._rank = places, matrices, rank
        self._host, self._dtype, self._device = HostAdapters(host_bytes), dtype, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._changed = threading.Condition()
        self._under_way = 0
        self._done: list[int] = []
        self._nbytes = 0
        self._failed: list[tuple[int, str]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-adapters")

    def check(self, adapter: Adapter) -> None:
        """StoreError when a load of the adapter would fail here. Any thread may ask."""
        self._places.locate(self._open(adapter), self._rank)

    def begin(self, loads: Sequence[AdapterLoad]) -> None:
        """Begin loads into slots that no row uses; no pass is under way."""
        for load in loads:
            with self._changed:
                self._under_way += 1
            self._thread.submit(self._run, load)

    def take(self) -> EndedLoads:
        """What has ended since it was last asked."""
        with self._changed:
            ended = EndedLoads(tuple(self._done), tuple(self._failed), self._nbytes)
            self._done, self._failed, self._nbytes = [], [], 0
        return ended

    def wait(self, deadline: float) -> bool:
        """Whether all loads under way end within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, deadline)

    def _run(self, load: AdapterLoad) -> None:
        failure, nbytes = None, 0
        try:
            with torch.inference_mode(), self._on_stream():
                adapter = self._obtain(load.adapter)
                self._matrices.put(load.slot, adapter)
                nbytes = nbytes_of(adapter)
                if self._stream is not None:
                    self._stream.synchronize()
        except HeadraceError as error:
            failure = str(error)
        except Exception as error:  # whoever waits for it is told
            log.exception("loading the adapter %s", load.adapter.path)
            failure = f"the adapter {load.adapter.path} could not be loaded: {error}"
        with self._changed:
            self._under_way -= 1
            self._nbytes += nbytes
            if failure is None:
                self._done.append(load.number)
            else:
                self._failed.append((load.number, failure))
            self._changed.notify_all()

    def _obtain(self, adapter: Adapter) -> HostAdapter:
        found = self._host.find(adapter.digest)
        if found is None:
            files = self._open(adapter)
            found = self._read(files, self._places.locate(files, self._rank))
            self._host.keep(adapter.digest, found)
        return found

    @staticmethod
    def _open(adapter: Adapter) -> AdapterFiles:
        files = open_adapter(Path(adapter.path))
        if files.adapter.digest != adapter.digest:
            raise StoreError(
                f"the files of the adapter {adapter.path} have changed since it was named: unload it, and load it"
                " again"
            )
        return files

    def _read(self, files: AdapterFiles, places: dict[str, Factors]) -> HostAdapter:
        try:
            with safe_open(files.weights, "pt") as opened:
                return {
                    place: HostFactors(
                        self._in_host(opened.get_tensor(each.a)),
                        self._in_host(opened.get_tensor(each.b).T),
                        each.scale,
                    )
                    for place, each in places.items()
                }
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{files.weights} cannot be read: {error}") from error

    def _in_host(self, matrix: torch.Tensor) -> torch.Tensor:
        made = matrix.to(self._dtype).contiguous()
        return made.pin_memory() if self._stream is not None else made

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def memory(self) -> Iterable[Holding]:
        yield from self._matrices.memory()
        yield from self._host.memory()

    def close(self) -> None:
        """Return when no load is under way. Safe to call twice."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
