"""Room for KV pages below the device, and what it costs to have one from there."""

from collections.abc import Sequence

from headrace.scheduler.config import KVCosts
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.inputs import Budget, DeviceProfile, ModelShape
from headrace.scheduler.memory import Layout, page_bytes, slot_bytes, window_slot_bytes
from headrace.scheduler.placement import Prediction
from headrace.scheduler.sizes import format_size

SEGMENT_BYTES = 256 << 20
"""Most bytes of a file of pages on NVMe. Room is made by deleting whole files."""

LEAST_SEGMENT = 1 << 20
SEGMENTS = 16
"""Files that the room on a drive is cut into, if it is large enough."""

_AROUND_A_PAGE = 16 << 10
"""Bytes of a file besides its only page, on the large side: blocks of 4 KiB for header and footer, the
page's head, and padding."""

GIGA = 1e9


def _slots(shape: ModelShape, layout: Layout) -> list[int]:
    """Bytes of a host slot of each stage, which are those of a page on its drive."""
    return [slot_bytes(page_bytes(shape, layout, stage)) for stage in range(layout.num_stages)]


def nvme_pages(
    shape: ModelShape, layout: Layout, budgets: Sequence[Budget], window_pages: int
) -> int:
    """KV pages for which every stage has room in its log on its drive, beside so many slots there."""
    slots, window = _slots(shape, layout), _window_slots(shape, layout)
    stages = zip(budgets, slots, window, strict=True)
    return min((budget.kv_disk - window_pages * own) // slot for budget, slot, own in stages)


def _window_slots(shape: ModelShape, layout: Layout) -> list[int]:
    """Bytes of a slot on each stage's drive for a page that is decoded over."""
    layers = layout.layers
    return [window_slot_bytes(shape.layer_kv_bytes[i] for i in of_stage) for of_stage in layers]


def most_window_pages(shape: ModelShape, layout: Layout, budgets: Sequence[Budget]) -> int:
    """KV pages that may have slots on every stage's drive to be decoded over: half of what is given of it,
    and no more than leaves the log the files that it needs."""
    stages = zip(budgets, _slots(shape, layout), _window_slots(shape, layout), strict=True)
    return min(
        max(0, min(budget.kv_disk // 2, budget.kv_disk - least_disk(slot))) // own
        for budget, slot, own in stages
    )


def segment_bytes(disk: int, slot: int) -> int:
    """The most bytes of a file where `disk` bytes are for pages of `slot` bytes each."""
    return max(_least_segment(slot), min(SEGMENT_BYTES, disk // SEGMENTS))


def least_disk(slot: int) -> int:
    """Bytes for pages of `slot` bytes: a file is written while another one is deleted."""
    return 2 * _least_segment(slot)


def _least_segment(slot: int) -> int:
    return max(LEAST_SEGMENT, slot + _AROUND_A_PAGE)


def check_room(
    shape: ModelShape, layout: Layout, budgets: Sequence[Budget], host_pages: int
) -> None:
    """DoesNotFitError for room that was asked for and holds no page: it would be there in vain."""
    slot = max(_slots(shape, layout))
    given = min(budget.kv_host_memory for budget in budgets)
    if given and not host_pages:
        raise DoesNotFitError(
            f"--kv-host-memory {format_size(given)} holds no KV page of a stage's layers: give it at"
            f" least {format_size(slot, up=True)} for each page, or leave it out"
        )
    disk, least = min(budget.kv_disk for budget in budgets), least_disk(slot)
    if 0 < disk < least:
        raise DoesNotFitError(
            f"--kv-disk {format_size(disk)} is too little: two files of KV pages take"
            f" {format_size(least, up=True)} here, one that is written while the other is deleted"
        )


def kv_costs(
    shape: ModelShape,
    layout: Layout,
    profiles: Sequence[DeviceProfile],
    prediction: Prediction,
) -> KVCosts:
    """What pages and tokens cost in seconds, by the speeds that the plan is made of.

    A page from host RAM: its bytes over the link of each stage, all at the same time, so that the
    slowest decides. From NVMe: as much again from the drive before that, for bytes are verified in
    host RAM before they go on. A token: its share of the arithmetic of a pass, and nothing else. A
    prompt rides passes that run anyway, and streamed weights, device memory and hops take as long
    with it as without it. So where the arithmetic is nothing, computing a page costs nothing, either.
    """
    stages = list(zip(_slots(shape, layout), profiles, strict=True))
    host = max(slot / (profile.host_gbps * GIGA) for slot, profile in stages)
    drive = max(slot / (profile.nvme_gbps * GIGA) for slot, profile in stages)
    return KVCosts(
        host_page=host,
        nvme_page=host + drive,
        token=prediction.terms["compute"] / prediction.sequences,
    )
