"""Pages of one tier: who holds them, what they hold, and what is being done to them.

A pool knows ids and keys; the bytes lie on the stages. Device pages and host slots are both such
pages, and so are tails, which never have keys.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from headrace.scheduler.plan import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """Pages that hold the keys and values of `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class PageState(Enum):
    FREE = "free"  # holds nothing
    USED = "used"  # held, and under no move
    CACHED = "cached"  # held by nobody, found by its key, taken when there is need
    COMING = "coming"  # a move writes it, or is going to; its key is known already
    LEAVING = "leaving"  # moves read it; whoever holds it may read it, too


LEGAL: Mapping[PageState, frozenset[PageState]] = {
    # A page of one's own to write, or the target of a move.
    PageState.FREE: frozenset({PageState.USED, PageState.COMING}),
    # The last holder lets go: of a page with a key, or of one that nobody could find. A page that is
    # held can be copied: it is full, and nobody writes it.
    PageState.USED: frozenset({PageState.CACHED, PageState.FREE, PageState.LEAVING}),
    # Found, taken back, or copied while there is time.
    PageState.CACHED: frozenset({PageState.USED, PageState.FREE, PageState.LEAVING}),
    # Arrived for those who wait for it, or for nobody any more; lost, or given up before it was begun.
    PageState.COMING: frozenset({PageState.USED, PageState.CACHED, PageState.FREE}),
    # The last copy has ended; freed if it found the bytes damaged.
    PageState.LEAVING: frozenset({PageState.USED, PageState.CACHED, PageState.FREE}),
}
"""Each state's next ones. Whatever is not here cannot happen: it would lose or double a page."""


@dataclass(slots=True)
class _Page:
    state: PageState = PageState.FREE
    holders: int = 0
    readers: int = 0  # moves that copy from it
    key: bytes | None = None
    precious: bool = False


class PagePool:
    """Page ids 0 .. num_pages - 1, each in one PageState.

    Pages are held by any number of holders. One that nobody holds is free, or stays cached under its
    key until it is taken: the one that was let go first goes first, but precious ones after all
    others. `on_evict` is told the key of a cached page that was taken.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[bytes], None] | None = None) -> None:
        self.num_pages = num_pages
        self.num_evicted = 0
        self._on_evict = on_evict
        self._pages = [_Page() for _ in range(num_pages)]
        self._counts = dict.fromkeys(PageState, 0)
        self._counts[PageState.FREE] = num_pages
        self._free = list(reversed(range(num_pages)))
        self._by_key: dict[bytes, int] = {}
        self._moving: set[int] = set()
        # Cached pages, the next to go first: those that are not precious, and those that are.
        self._cached: tuple[OrderedDict[int, None], ...] = (OrderedDict(), OrderedDict())

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: those that hold nothing and those that are cached."""
        return len(self._free) + len(self._cached[False]) + len(self._cached[True])

    @property
    def num_spare(self) -> int:
        """Pages that can be allocated without loss of a precious one."""
        return len(self._free) + len(self._cached[False])

    @property
    def num_settling(self) -> int:
        """Pages that nobody holds and that can be allocated when their moves have ended."""
        return sum(not self._pages[page].holders for page in self._moving)

    def count(self, state: PageState) -> int:
        return self._counts[state]

    def state(self, page: int) -> PageState:
        return self._pages[page].state

    def key(self, page: int) -> bytes | None:
        return self._pages[page].key

    def is_held(self, page: int) -> bool:
        return self._pages[page].holders > 0

    def is_shared(self, page: int) -> bool:
        """Whether more than one hold it."""
        return self._pages[page].holders > 1

    def find(self, key: bytes) -> int | None:
        """The page that holds what `key` names, or will when it has come."""
        return self._by_key.get(key)

    def coldest(self, count: int) -> list[int]:
        """Up to `count` precious cached pages, the next to go first."""
        return list(islice(self._cached[True], count))

    def resting(self) -> list[int]:
        """All cached pages, the next to go first."""
        return [*self._cached[False], *self._cached[True]]

    def filled(self) -> tuple[int, ...]:
        """All pages that hold something: for a request, or to be found."""
        empty = PageState.FREE, PageState.COMING
        return tuple(i for i, page in enumerate(self._pages) if page.state not in empty)

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages to hold and write; the caller has asked `can_allocate` first."""
        assert 0 <= count <= self.num_free, (count, self.num_free)
        return [self._take(PageState.USED) for _ in range(count)]

    def reserve(self, key: bytes) -> int:
        """Take a page, which nobody holds yet, for a move to bring `key` to."""
        assert key not in self._by_key, key.hex()
        page = self._take(PageState.COMING)
        self._pages[page].key = key
        self._by_key[key] = page
        return page

    def share(self, page: int) -> None:
        """Hold a page that was found, as others may."""
        entry = self._pages[page]
        assert entry.key is not None, page
        entry.holders += 1
        if entry.state is PageState.CACHED:
            self._enter(page, PageState.USED)

    def free(self, pages: Sequence[int]) -> None:
        """Let go of pages. Of a sequence's pages the last is the first to be taken, if they are cached."""
        for page in reversed(pages):
            entry = self._pages[page]
            assert entry.holders, f"not allocated: {page}"
            entry.holders -= 1
            if not entry.holders and entry.state is PageState.USED:
                self._rest(page)

    def name(self, page: int, key: bytes) -> None:
        """Let a page that is held be found by `key`, unless another page is found by it already."""
        entry = self._pages[page]
        assert entry.state is PageState.USED and entry.key is None, (page, entry)
        if key not in self._by_key:
            entry.key = key
            self._by_key[key] = page

    def forget(self, page: int) -> None:
        """Let a page be found no more: what it was to hold is lost, or not to be trusted."""
        entry = self._pages[page]
        assert entry.key is not None, page
        self._drop_key(entry)
        if entry.state in (PageState.CACHED, PageState.COMING):
            self._rest(page)

    def rate(self, page: int, *, precious: bool) -> None:
        """Say whether the page is to be taken after all that are not precious."""
        entry = self._pages[page]
        if entry.state is PageState.CACHED and entry.precious != precious:
            del self._cached[entry.precious][page]
            self._cached[precious][page] = None
        entry.precious = precious

    def depart(self, page: int) -> None:
        """A move begins to copy from the page."""
        entry = self._pages[page]
        assert entry.key is not None, page
        entry.readers += 1
        if entry.state is not PageState.LEAVING:
            self._enter(page, PageState.LEAVING)

    def departed(self, page: int) -> None:
        """A move that copied from the page has ended."""
        entry = self._pages[page]
        assert entry.state is PageState.LEAVING and entry.readers, (page, entry)
        entry.readers -= 1
        if not entry.readers:
            self._rest(page)

    def arrived(self, page: int) -> None:
        """The move that wrote the page has ended."""
        assert self._pages[page].state is PageState.COMING, (page, self._pages[page])
        self._rest(page)

    def check_integrity(self) -> None:
        """Assert that every page is in one state, in the list of that state, and found by its key."""
        assert sum(self._counts.values()) == self.num_pages
        listed = [*self._free, *self._cached[False], *self._cached[True], *self._moving]
        listed += [i for i, page in enumerate(self._pages) if page.state is PageState.USED]
        assert sorted(listed) == list(range(self.num_pages)), "a page lost or doubled"
        for state, found in (
            (PageState.FREE, self._free),
            (PageState.CACHED, [*self._cached[False], *self._cached[True]]),
        ):
            assert all(self._pages[page].state is state for page in found)
            assert len(found) == self._counts[state]
        keyed = {page.key: i for i, page in enumerate(self._pages) if page.key is not None}
        assert keyed == self._by_key
        for i, page in enumerate(self._pages):
            _check_page(page)
            assert page.state is not PageState.CACHED or i in self._cached[page.precious]

    def _take(self, state: PageState) -> int:
        """A page for `state`, free or else evicted."""
        evicted = None
        if not self._free:
            cached = self._cached[False] or self._cached[True]
            assert cached, "no page to take"
            page = next(iter(cached))
            evicted = self._pages[page].key
            self.num_evicted += 1
            self.forget(page)
        page = self._free[-1]
        self._enter(page, state)
        entry = self._pages[page]
        entry.holders = int(state is PageState.USED)
        entry.precious = False
        if evicted is not None and self._on_evict is not None:
            self._on_evict(evicted)
        return page

    def _rest(self, page: int) -> None:
        """To the state of a page that no move concerns."""
        entry = self._pages[page]
        if entry.holders:
            self._enter(page, PageState.USED)
        else:
            self._enter(page, PageState.CACHED if entry.key is not None else PageState.FREE)

    def _enter(self, page: int, state: PageState) -> None:
        """Change the page's state and the list that it is in."""
        entry = self._pages[page]
        assert state in LEGAL[entry.state], f"page {page}: {entry.state.value} -> {state.value}"
        if entry.state is PageState.FREE:
            top = self._free.pop()
            assert top == page, (top, page)
        elif entry.state is PageState.CACHED:
            del self._cached[entry.precious][page]
        self._moving.discard(page)
        self._counts[entry.state] -= 1
        self._counts[state] += 1
        entry.state = state
        if state is PageState.FREE:
            self._free.append(page)
        elif state is PageState.CACHED:
            self._cached[entry.precious][page] = None
        elif state is not PageState.USED:
            self._moving.add(page)

    def _drop_key(self, entry: _Page) -> None:
        assert entry.key is not None
        del self._by_key[entry.key]
        entry.key = None


def _check_page(page: _Page) -> None:
    """Assert what each state says of a page's holders, readers and key."""
    state = page.state
    assert (page.readers > 0) == (state is PageState.LEAVING), page
    assert page.holders >= 0
    if state is PageState.USED:
        assert page.holders, page
    elif state in (PageState.FREE, PageState.CACHED):
        assert not page.holders, page
    if state is PageState.FREE:
        assert page.key is None, page
    elif state in (PageState.CACHED, PageState.COMING):
        assert page.key is not None, page
