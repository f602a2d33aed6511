"""Which pages sink to NVMe, when host slots are free for others, and what becomes of lost and damaged ones."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from guests import CONFIG, computed, end_moves

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.hosting import Hosting
from headrace.scheduler.plan import PAGE_TOKENS, MoveKind
from headrace.scheduler.request import FinishReason, Request

SINKING = replace(CONFIG, host_pages=6, window_pages=8, hot_window=PAGE_TOKENS)
HOST = SINKING.host_pages


def settle(holdings: Holdings, hosting: Hosting, running: list[Request]) -> list[MoveKind]:
    """Until nothing moves: all that was moved."""
    kinds = []
    while holdings.is_moving:
        kinds += end_moves(holdings)
        for _ in range(2):  # what others have on NVMe by now needs no move
            hosting.advance(running)
        holdings.check_integrity(running)
    return kinds


def hosted(
    pages: Sequence[int], config: SchedulerConfig = SINKING
) -> tuple[Holdings, Hosting, list[Request]]:
    """Requests of so many full pages each, of which those that can are guests."""
    holdings = Holdings(config)
    hosting = Hosting(config, holdings)
    running = [computed(holdings, i, count, first=i) for i, count in enumerate(pages)]
    hosting.advance(running)
    hosting.make_room(config.num_pages - len(pages), running)
    return holdings, hosting, running


def test_all_that_fits_host_memory_stays_there() -> None:
    holdings, hosting, running = hosted([4], replace(SINKING, host_pages=8))
    assert settle(holdings, hosting, running) == [MoveKind.OUT] * 4
    assert running[0].num_cold == 4 and running[0].num_sunk == 0


def test_old_pages_make_room_for_another_guest() -> None:
    """Five slots may be held, and eight pages are to leave the device: the window of each stays."""
    holdings, hosting, running = hosted([4, 4])
    assert all(request.is_hosted for request in running)
    kinds = settle(holdings, hosting, running)
    assert kinds.count(MoveKind.OUT) == 8 and kinds.count(MoveKind.SINK) >= 3
    for request in running:
        assert request.num_cold == 4 and len(request.pages) == 1
        assert request.num_sunk <= 3, "the newest 64 tokens are in host memory"
        assert all(slot >= HOST for slot in request.slots[: request.num_sunk])
        assert all(slot < HOST for slot in request.slots[request.num_sunk :])
    stats = holdings.stats()
    assert stats.sunk == sum(request.num_sunk for request in running) >= 3
    assert stats.cold + stats.sunk == 8
    for request in running:
        holdings.release(request)
    holdings.check_integrity()
    assert holdings.stats().sunk == holdings.stats().cold == 0


def test_nobody_is_asked_for_whom_even_nvme_has_no_room() -> None:
    _, _, running = hosted([4, 4], replace(SINKING, window_pages=2))
    assert [request.is_hosted for request in running].count(True) == 1
    _, _, running = hosted([4, 4], replace(SINKING, hot_window=4 * PAGE_TOKENS))
    assert [request.is_hosted for request in running].count(True) == 1


def test_a_request_in_flight_keeps_what_it_reads() -> None:
    holdings, hosting, running = hosted([4, 4])
    end_moves(holdings)
    hosting.advance(running)
    sinking = [request for request in running if request.sinking]
    assert sinking
    before = {request.request_id: list(request.slots) for request in running}
    for request in running:
        request.passes.append(1)
    end_moves(holdings)
    hosting.advance(running)
    for request in sinking:
        assert request.slots[:3] == before[request.request_id][:3] and not request.num_sunk
        assert hosting.is_due(request)
        request.passes.clear()
    hosting.advance(running)
    assert all(request.num_sunk for request in sinking)
    holdings.check_integrity(running)


def test_a_copy_that_is_lost_leaves_its_page_in_host_memory() -> None:
    holdings, hosting, running = hosted([4, 4])
    end_moves(holdings)
    hosting.advance(running)
    asked = [request for request in running if request.sinking]
    for _ in range(4):
        moves = holdings.take_moves()
        sinks = [move.number for move in moves if move.kind is MoveKind.SINK]
        others = [move.number for move in moves if move.kind is not MoveKind.SINK]
        holdings.settle(others, sinks)
        hosting.advance(running)
        holdings.check_integrity(running)
    assert all(not r.num_sunk and not r.sinking and not r.may_sink for r in asked)
    assert holdings.stats().lost[MoveKind.SINK] > 0 == holdings.stats().sunk


def test_requests_with_the_same_beginning_share_what_has_sunk() -> None:
    config = replace(SINKING, host_pages=4, num_pages=20)
    holdings = Holdings(config)
    hosting = Hosting(config, holdings)
    first = computed(holdings, 0, 4)
    second = computed(holdings, 1, 4)
    running = [first, second]
    assert first.pages[:3] == second.pages[:3]
    hosting.advance(running)
    hosting.make_room(18, running)
    settle(holdings, hosting, running)
    assert first.num_sunk and first.slots[: first.num_sunk] == second.slots[: first.num_sunk]
    assert holdings.stats().sunk == max(first.num_sunk, second.num_sunk)
    holdings.release(first)
    holdings.check_integrity([second])
    assert second.num_sunk and holdings.stats().sunk == second.num_sunk


def test_pages_that_are_to_be_kept_do_not_sink() -> None:
    holdings = Holdings(SINKING)
    request = computed(holdings, 0, 4)
    assert holdings.cold.sunk.num_old(request) == 3
    kept = Request(1, [1], request.params, 0, keep=True)
    assert not kept.may_sink and not holdings.cold.sunk.num_old(kept)


def test_damage_spoils_a_request_once_and_shares_nothing() -> None:
    holdings, hosting, running = hosted([4, 4])
    settle(holdings, hosting, running)
    request = max(running, key=lambda request: request.num_sunk)
    keys = request.keys[: request.num_sunk]
    holdings.spoil(request)
    holdings.spoil(request)
    window = holdings.cache.tiers.window
    assert request.is_spoiled and not request.may_sink and holdings.stats().spoiled == 1
    assert not any(window.find(key) for key in keys)
    holdings.check_integrity(running)
    holdings.release(request)
    assert not request.is_spoiled
    request.finish_reason = FinishReason.ABORT
    holdings.check_integrity([other for other in running if other is not request])


def test_slots_on_nvme_need_a_ring() -> None:
    with pytest.raises(HeadraceError, match="kv_ring_pages must be at least 1"):
        replace(CONFIG, window_pages=1, kv_ring_pages=0, cold_micro_batches=0)
