"""Pages on their way into a KV log: who writes which, and which wait for company."""

import threading
from collections.abc import Callable, Sequence

from headrace.runtime.kv_log.catalog import Catalog
from headrace.runtime.kv_log.cohort import Cohort, Waiting
from headrace.runtime.kv_log.endurance import WriteBudget
from headrace.runtime.kv_log.extents import Page
from headrace.runtime.kv_log.record import KEY_BYTES
from headrace.runtime.kv_log.segment import EXTENT_BYTES
from headrace.runtime.kv_log.stats import Counts
from headrace.scheduler.inputs import KV_LOG_BYTES

_MAX_TENANT = 256  # bytes of its name


def check_tenant(tenant: str) -> None:
    """Raises ValueError for what can be no tenant's name."""
    if not tenant.isprintable() or not 0 < len(tenant.encode()) <= _MAX_TENANT:
        raise ValueError(f"a tenant's name is 1 to {_MAX_TENANT} printable bytes, not {tenant!r}")


class Intake:
    """Puts that have not come to writing. `changed` is the catalog's lock."""

    def __init__(
        self,
        catalog: Catalog,
        changed: threading.Condition,
        budget: WriteBudget,
        counts: Counts,
        clock: Callable[[], float],
        max_page: int,
    ) -> None:
        self._catalog = catalog
        self._changed = changed
        self._budget = budget
        self._counts = counts
        self._clock = clock
        self._max_page = max_page

    def check(self, pages: Sequence[tuple[bytes, memoryview]], tenant: str) -> None:
        """Raises ValueError for what can be no page, and for what can be no tenant."""
        check_tenant(tenant)
        for key, page in pages:
            if len(key) != KEY_BYTES:
                raise ValueError(f"a page's key has {KEY_BYTES} bytes, not {len(key)}")
            if not 0 < len(page) <= self._max_page:
                raise ValueError(f"a page has 1 to {self._max_page} bytes here, not {len(page)}")

    def admit(self, cohort: Cohort, pages: Sequence[tuple[bytes, memoryview]]) -> list[Page]:
        """What the caller has to write now: new pages and those that waited for them, or nothing."""
        claimed = self._claim(cohort, pages)
        if claimed and not self._budget.take(sum(len(page.payload) for page in claimed)):
            self._refuse(claimed)
            return []
        return self._gather(cohort, claimed)

    def _claim(self, cohort: Cohort, pages: Sequence[tuple[bytes, memoryview]]) -> list[Page]:
        """Those that nobody has put."""
        claimed, index = [], self._catalog.index
        with self._changed:
            for key, page in pages:
                place = index.get(key)
                if place is None or (isinstance(place, Waiting) and place.cohort.dropped):
                    mark = index[key] = Waiting(None, cohort)
                    claimed.append(Page(key, page, mark))
        return claimed

    def _refuse(self, claimed: Sequence[Page]) -> None:
        with self._changed:
            self._counts.refused += len(claimed)
            for page in claimed:
                if self._catalog.index.get(page.key) is page.mark:
                    del self._catalog.index[page.key]

    def _gather(self, cohort: Cohort, claimed: list[Page]) -> list[Page]:
        """Small puts are copied: their memory is the caller's again when put returns."""
        if not claimed:
            return []
        if sum(len(page.payload) for page in claimed) >= EXTENT_BYTES:
            with self._changed:
                return [*self._take(self._catalog.back(cohort)), *claimed]
        copies, now = [bytes(page.payload) for page in claimed], self._clock()
        with self._changed:
            for page, payload in zip(claimed, copies, strict=True):
                if not self._catalog.wait(cohort, page.key, page.mark, payload, now):
                    self._counts.lost += 1
            cohort = self._catalog.back(cohort)
            return self._take(cohort) if cohort.waiting_bytes >= EXTENT_BYTES else []

    def take_surplus(self) -> tuple[Cohort, list[Page]] | None:
        """Pages that have to be written because too many wait, in an extent as small as they are."""
        with self._changed:
            if self._catalog.waiting_bytes <= KV_LOG_BYTES:
                return None
            cohort = self._catalog.longest_waiting()
            return None if cohort is None else (cohort, self._take(cohort))

    def take_all(self) -> list[tuple[Cohort, list[Page]]]:
        """All pages that wait, to be written now."""
        with self._changed:
            cohorts = [cohort for cohort in self._catalog.cohorts.values() if cohort.waiting]
            return [(cohort, self._take(cohort)) for cohort in cohorts]

    def _take(self, cohort: Cohort) -> list[Page]:
        """With the lock held."""
        waiting = self._catalog.take_waiting(cohort)
        return [Page(key, mark.payload, mark) for key, mark in waiting.items() if mark.payload]
