"""kvikio's path against real files; needs CUDA, because kvikio asks its driver about every pointer."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.runtime.streaming.kvikio_storage import KvikioStorage
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.scheduler.errors import HeadraceError, StoreError

PAGE = 4096


def test_without_cuda_it_is_refused_in_words() -> None:
    with pytest.raises(HeadraceError, match="reads into CUDA devices"):
        KvikioStorage(torch.device("cpu"))


@pytest.fixture
def storage() -> Iterator[KvikioStorage]:
    try:
        opened = KvikioStorage(torch.device("cuda", torch.cuda.current_device()))
    except HeadraceError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(3000 * PAGE))
    return path


@pytest.mark.gpu
def test_extents_land_on_the_device_and_in_host_memory(storage: KvikioStorage, file: Path) -> None:
    host = AlignedBuffer(2500 * PAGE).tensor
    on_device = torch.empty(2500 * PAGE, dtype=torch.uint8, device="cuda")
    loads = [storage.load(file, 7 * PAGE, dest) for dest in (host, on_device)]
    for load in loads:
        load.wait()
    wanted = file.read_bytes()[7 * PAGE : 2507 * PAGE]
    assert host.numpy().tobytes() == wanted
    assert on_device.cpu().numpy().tobytes() == wanted


@pytest.mark.gpu
def test_a_truncated_or_missing_file_is_named(storage: KvikioStorage, file: Path) -> None:
    dest = torch.empty(2000 * PAGE, dtype=torch.uint8, device="cuda")
    with pytest.raises(StoreError, match="weights"):
        storage.load(file, 2000 * PAGE, dest).wait()
    with pytest.raises(StoreError, match="missing"):
        storage.load(file.with_name("missing"), 0, dest).wait()
