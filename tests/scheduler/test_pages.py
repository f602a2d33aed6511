"""The page pool: ids go out once and come back."""

import pytest

from headrace.scheduler.pages import LEGAL, PagePool, PageState, pages_for
from headrace.scheduler.plan import PAGE_TOKENS


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2)]
)
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_allocated_pages_are_distinct_and_come_back() -> None:
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.can_allocate(0)
    assert not pool.can_allocate(1)
    pool.check_integrity()
    pool.free(second)
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == sorted(second)
    pool.check_integrity()


def test_low_ids_are_handed_out_first() -> None:
    assert PagePool(4).allocate(3) == [0, 1, 2]


def test_freeing_what_is_not_allocated_is_our_error() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free(pages)


def test_allocating_more_than_is_free_is_our_error() -> None:
    with pytest.raises(AssertionError):
        PagePool(2).allocate(3)


def test_freeing_a_page_twice_at_once_is_our_error() -> None:
    pool = PagePool(2)
    [page] = pool.allocate(1)
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free([page, page])


FREE, USED, CACHED, COMING, LEAVING = PageState


def cached(pool: PagePool, *keys: bytes) -> list[int]:
    """Pages that are let go of one after the other, each to be found by a key."""
    pages = pool.allocate(len(keys))
    for page, key in zip(pages, keys, strict=True):
        pool.name(page, key)
        pool.free([page])
    return pages


def in_state(state: PageState) -> PagePool:
    """A pool whose only page is in that state, held by nobody if it need not be."""
    pool = PagePool(1)
    if state is USED:
        pool.allocate(1)
    elif state is COMING:
        pool.reserve(b"k")
    elif state is not FREE:
        cached(pool, b"k")
        if state is LEAVING:
            pool.depart(0)
    assert pool.state(0) is state
    return pool


@pytest.mark.parametrize("before", PageState)
@pytest.mark.parametrize("after", PageState)
def test_no_page_changes_its_state_but_by_the_table(before: PageState, after: PageState) -> None:
    pool = in_state(before)
    if after in LEGAL[before]:
        pool._enter(0, after)
        assert (pool.state(0), pool.count(after)) == (after, 1)
    else:
        with pytest.raises(AssertionError, match=f"{before.value} -> {after.value}"):
            pool._enter(0, after)


def test_a_page_is_used_cached_found_again_and_taken_back() -> None:
    pool = PagePool(1)
    [page] = pool.allocate(1)
    pool.name(page, b"k")
    assert (pool.find(b"k"), pool.state(page)) == (page, USED)
    pool.share(page)
    pool.free([page])
    assert pool.state(page) is USED  # there is another holder
    pool.free([page])
    assert (pool.state(page), pool.num_free) == (CACHED, 1)
    pool.share(page)
    assert (pool.state(page), pool.num_free) == (USED, 0)
    pool.free([page])
    assert pool.allocate(1) == [page]
    assert (pool.find(b"k"), pool.num_evicted) == (None, 1)
    pool.free([page])
    assert pool.state(page) is FREE
    pool.check_integrity()


def test_a_page_that_leaves_is_no_page_to_be_had_but_can_be_shared() -> None:
    pool = in_state(LEAVING)
    assert (pool.num_free, pool.num_settling, pool.find(b"k")) == (0, 1, 0)
    pool.share(0)
    assert (pool.state(0), pool.num_settling) == (LEAVING, 0)
    pool.departed(0)
    assert pool.state(0) is USED
    pool.free([0])
    assert pool.state(0) is CACHED
    pool.check_integrity()


def test_a_page_leaves_until_its_last_copy_has_ended() -> None:
    pool = in_state(LEAVING)
    pool.depart(0)
    pool.departed(0)
    assert pool.state(0) is LEAVING
    pool.forget(0)  # found damaged
    assert (pool.state(0), pool.find(b"k")) == (LEAVING, None)
    pool.departed(0)
    assert pool.state(0) is FREE
    pool.check_integrity()


def test_a_page_that_is_coming_arrives_for_those_who_wait_or_for_nobody() -> None:
    pool = in_state(COMING)
    assert (pool.num_free, pool.num_settling) == (0, 1)
    pool.share(0)
    pool.free([0])
    assert pool.state(0) is COMING
    pool.arrived(0)
    assert pool.state(0) is CACHED
    pool = in_state(COMING)
    pool.share(0)
    pool.arrived(0)
    assert pool.state(0) is USED


def test_a_page_that_was_lost_is_its_holders_to_free() -> None:
    pool = in_state(COMING)
    pool.share(0)
    pool.forget(0)
    assert (pool.state(0), pool.find(b"k")) == (USED, None)
    pool.free([0])
    assert pool.state(0) is FREE
    pool = in_state(COMING)
    pool.forget(0)
    assert pool.state(0) is FREE


def test_the_coldest_goes_first_and_of_a_sequence_the_last() -> None:
    evicted: list[bytes] = []
    pool = PagePool(5, evicted.append)
    pages = pool.allocate(3)
    for page, key in zip(pages, (b"0", b"1", b"2"), strict=True):
        pool.name(page, key)
    pool.free(pages)
    cached(pool, b"x", b"y")
    pool.allocate(4)
    assert evicted == [b"2", b"1", b"0", b"x"]
    assert pool.find(b"y") is not None


def test_precious_pages_go_last() -> None:
    evicted: list[bytes] = []
    pool = PagePool(3, evicted.append)
    a, b, _ = cached(pool, b"a", b"b", b"c")
    pool.rate(a, precious=True)
    pool.rate(b, precious=True)
    assert (pool.num_spare, pool.coldest(9), pool.coldest(1)) == (1, [a, b], [a])
    pool.rate(b, precious=False)
    assert (pool.num_free, pool.num_spare, pool.coldest(9)) == (3, 2, [a])
    pool.allocate(3)
    assert evicted == [b"c", b"b", b"a"]


def test_of_two_pages_with_one_content_the_first_is_found() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.name(first, b"k")
    pool.name(second, b"k")
    pool.free([second])
    assert (pool.find(b"k"), pool.state(second)) == (first, FREE)


def test_a_page_under_a_move_is_never_taken() -> None:
    pool = in_state(LEAVING)
    assert not pool.can_allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(1)
