"""Who becomes a guest of host RAM, and when its device pages are free."""

from dataclasses import replace

import pytest
from guests import CONFIG, computed, end_moves

from headrace.scheduler.config import KVCosts
from headrace.scheduler.draft import Draft
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.hosting import Hosting
from headrace.scheduler.plan import MoveKind, Slice
from headrace.scheduler.request import FinishReason


def test_the_request_with_most_pages_goes_and_keeps_its_newest() -> None:
    holdings = Holdings(CONFIG)
    hosting = Hosting(CONFIG, holdings)
    running = [computed(holdings, i, pages, first=i) for i, pages in enumerate((2, 4, 1))]
    assert holdings.pool.num_free == 2
    hosting.advance(running)
    assert hosting.make_room(2, running) and not running[1].is_hosted
    assert hosting.make_room(5, running)
    assert [request.is_hosted for request in running] == [False, True, False]
    assert end_moves(holdings) == [MoveKind.OUT] * 4
    assert not holdings.can_grow(5)
    running[1].passes.append(1)
    hosting.advance(running)  # in flight, it keeps what it has
    assert hosting.is_due(running[1]) and running[1].num_cold == 0
    running[1].passes.clear()
    hosting.advance(running)
    assert (running[1].num_cold, len(running[1].pages)) == (4, 1)
    assert holdings.can_grow(6) and not hosting.make_room(12, [])
    holdings.check_integrity(running)


def test_pages_that_are_in_host_memory_already_are_free_at_once() -> None:
    """There is no move that anybody could wait for."""
    holdings = Holdings(CONFIG)
    hosting = Hosting(CONFIG, holdings)
    first = computed(holdings, 0, 3)
    first.keep, first.finish_reason = True, FinishReason.STOP
    holdings.release(first)
    assert end_moves(holdings) == [MoveKind.OUT] * 3
    second = computed(holdings, 1, 3)
    hosting.advance([second])
    assert not holdings.can_grow(11)
    assert hosting.make_room(11, [second])
    assert holdings.can_grow(11) and not holdings.is_moving
    assert (second.num_cold, len(second.pages)) == (3, 1)


def test_guests_are_called_back_when_there_is_room_for_all() -> None:
    holdings = Holdings(CONFIG)
    hosting = Hosting(CONFIG, holdings)
    guest = computed(holdings, 0, 4)
    hosting.advance([guest])
    assert hosting.make_room(11, [guest])
    end_moves(holdings)
    hosting.advance([guest])
    assert guest.num_cold == 4
    holdings.pool.free(holdings.pool.allocate(11))  # others have taken its pages
    hosting.call_back([guest], 3)
    assert not guest.returning
    hosting.call_back([guest], 4)
    assert len(guest.returning) == 4 and guest.is_hosted
    hosting.advance([guest])
    assert guest.num_cold == 4, "it goes on as it is until the pages have come"
    assert end_moves(holdings) == [MoveKind.IN] * 4
    hosting.advance([guest])
    assert (guest.num_cold, len(guest.pages), guest.slots) == (0, 5, []) and not guest.is_hosted
    holdings.check_integrity([guest])


@pytest.mark.parametrize("lost", [False, True])
def test_a_copy_that_is_lost_leaves_its_page_where_it_is(lost: bool) -> None:
    holdings = Holdings(CONFIG)
    hosting = Hosting(CONFIG, holdings)
    request = computed(holdings, 0, 4)
    hosting.advance([request])
    assert hosting.make_room(11, [request])
    end_moves(holdings, lost=lost)
    hosting.advance([request])
    assert (request.num_cold, len(request.pages)) == ((0, 5) if lost else (4, 1))
    assert request.stays == lost and request.is_hosted != lost
    assert hosting.make_room(11, [request]) != lost, "it is asked no more"
    holdings.check_integrity([request])


def test_nobody_goes_where_it_does_not_pay_or_has_no_room() -> None:
    for limits in (
        {"costs": KVCosts(host_page=1.0, decode=3.9)},
        {"kv_ring_pages": 4},  # it may become five pages long
        {"host_pages": 4},  # one slot is for others
        {"kv_ring_pages": 0, "cold_micro_batches": 0},
    ):
        config = replace(CONFIG, **limits)  # type: ignore[arg-type]
        holdings = Holdings(config)
        hosting = Hosting(config, holdings)
        request = computed(holdings, 0, 4)
        hosting.advance([request])
        assert not hosting.make_room(11, [request]) and not request.is_hosted, limits
    with pytest.raises(HeadraceError, match="give both or neither"):
        replace(CONFIG, cold_micro_batches=0)


def piece(number: int, cold: int, tokens: int = 1) -> Slice:
    return Slice(number, 0, (1,) * tokens, (0,), None, cold=tuple(range(cold)))


def test_slices_with_cold_pages_have_micro_batches_of_their_own() -> None:
    draft = Draft(CONFIG, 8)
    for number, cold in enumerate((0, 4, 3, 0, 2)):
        draft.add(piece(number, cold))
    assert draft.cold_room(4) == 0 < draft.cold_room(3) and draft.room == 255
    batches = draft.pack()
    members = [[p.request for p in batch.slices] for batch in batches]
    assert members == [[0], [3], [1], [2, 4]]
    assert [batch.num_cold for batch in batches] == [0, 0, 4, 5]
    assert draft.left == 512 - 5
    for number in range(3):
        draft.add(piece(9 + number, 0))
    assert draft.left == draft.room == draft.cold_room(1) == 0
