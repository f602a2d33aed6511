"""Which KV pages and tails are free. They are integers; what they hold lives on the stages."""

from collections.abc import Sequence

from headrace.scheduler.plan import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """Pages that hold the keys and values of `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """Page ids 0 .. num_pages - 1, each free or allocated to one holder."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has asked `can_allocate` first."""
        assert 0 <= count <= len(self._free), (count, len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        assert self._used.issuperset(pages), f"not allocated: {set(pages) - self._used}"
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))

    def check_integrity(self) -> None:
        """Assert that every page is either free or allocated, once."""
        assert len(self._free) + len(self._used) == self.num_pages
        assert self._used.union(self._free) == set(range(self.num_pages))
