"""The streamer on CUDA: bytes are right although slots are overwritten behind running kernels."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from leftovers import our_threads

from headrace.runtime.manifest import Block
from headrace.runtime.streaming.direct import BufferedStorage, DirectStorage
from headrace.runtime.streaming.loads import Storage
from headrace.runtime.streaming.storage import choose_storage
from headrace.runtime.streaming.streamer import Streamer
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.scheduler.errors import HeadraceError, StoreError
from headrace.scheduler.placement import Tier

pytestmark = pytest.mark.gpu

PAGE = 4096
SIZES = (2049, 5000, 3, 4096, 777, 5000)  # pages: up to 20 MB, several chunks
SLOT_BYTES = 5000 * PAGE
BUSY_CYCLES = 20_000_000  # about 10 ms of a kernel that does nothing
TIERS = {
    "nvme": dict.fromkeys(range(6), Tier.NVME),
    "host": dict.fromkeys(range(6), Tier.HOST),
    "mixed": {i: (Tier.NVME, Tier.HOST, Tier.DEVICE)[i % 3] for i in range(6)},
}


@pytest.fixture
def device() -> Iterator[torch.device]:
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield device


@pytest.fixture
def blocks(tmp_path: Path) -> dict[int, Block]:
    made = {}
    for layer, pages in enumerate(SIZES):
        file = tmp_path / f"layer-{layer:05}.safetensors"
        file.write_bytes(b"h" * PAGE + os.urandom(pages * PAGE))
        made[layer] = Block(file.stem, file, PAGE, pages * PAGE, "", {})
    return made


@pytest.fixture(params=["auto", "direct", "buffered", "kvikio"])
def storage(
    request: pytest.FixtureRequest, device: torch.device, blocks: dict[int, Block]
) -> Iterator[Storage]:
    block = blocks[1]
    try:
        chosen = choose_storage(device, block.file, block.data_offset, block.nbytes, request.param)
    except HeadraceError as error:
        if "importing kvikio failed" in str(error) or "refuses O_DIRECT" in str(error):
            pytest.skip(str(error))
        raise
    yield chosen
    chosen.close()


def expected(block: Block) -> torch.Tensor:
    return torch.frombuffer(bytearray(block.file.read_bytes()[PAGE:]), dtype=torch.uint8)


def open_streamer(
    blocks: dict[int, Block],
    tiers: dict[int, Tier],
    visits: list[list[int]],
    storage: Storage,
    device: torch.device,
) -> Streamer:
    return Streamer(
        visits=visits,
        blocks=blocks,
        tiers=tiers,
        storage=storage,
        device=device,
        ring_slots=3,
        slot_bytes=SLOT_BYTES,
    )


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS.keys())
@pytest.mark.parametrize("visits", [[[i] for i in range(6)], [[0, 1], [2], [3, 4, 5]]])
def test_late_kernels_still_read_the_right_bytes(
    blocks: dict[int, Block],
    tiers: dict[int, Tier],
    visits: list[list[int]],
    storage: Storage,
    device: torch.device,
) -> None:
    """The host runs ahead of the compute stream, so slots are given back long before they are read."""
    seen: list[tuple[int, torch.Tensor]] = []
    with open_streamer(blocks, tiers, visits, storage, device) as streamer:
        for _ in range(3):
            for position in range(len(visits)):
                with streamer.hold(position) as weights:
                    torch.cuda._sleep(BUSY_CYCLES)
                    seen += [(layer, data.clone()) for layer, data in weights]
            counters = streamer.take_counters()
            assert counters.nvme_bytes == sum(
                blocks[i].nbytes for i in tiers if tiers[i] is Tier.NVME
            )
            assert counters.host_bytes == sum(
                blocks[i].nbytes for i in tiers if tiers[i] is Tier.HOST
            )
        torch.cuda.current_stream(device).synchronize()
        assert streamer.take_counters().wait_seconds >= 0
    for layer, data in seen:
        assert torch.equal(data.cpu(), expected(blocks[layer])), layer


def test_closing_early_leaves_no_thread(blocks: dict[int, Block], device: torch.device) -> None:
    before = our_threads()
    with BufferedStorage(device) as storage:
        visits = [[i] for i in range(6)]
        streamer = open_streamer(blocks, TIERS["mixed"], visits, storage, device)
        streamer.close()
        streamer.close()
    assert our_threads() == before


def test_a_truncated_layer_fails_its_visit(blocks: dict[int, Block], device: torch.device) -> None:
    os.truncate(blocks[1].file, 100 * PAGE)
    visits = [[i] for i in range(6)]
    with (
        DirectStorage(device) as storage,
        open_streamer(blocks, TIERS["nvme"], visits, storage, device) as streamer,
    ):
        with streamer.hold(0):
            pass
        with pytest.raises(StoreError, match="layer-00001"), streamer.hold(1):
            pass


def test_pinned_buffers_copy_beside_the_host(device: torch.device) -> None:
    with AlignedBuffer(PAGE * 3, pinned=True) as buffer:
        assert buffer.tensor.is_pinned()
        assert torch.equal(buffer.tensor.to(device).cpu(), buffer.tensor)
