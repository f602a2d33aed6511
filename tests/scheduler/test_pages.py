"""The page pool: ids go out once and come back."""

import pytest

from headrace.scheduler.pages import PagePool, pages_for
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
