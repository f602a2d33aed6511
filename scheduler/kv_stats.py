"""Where KV pages are now, and what became of those looked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.scheduler.plan import PAGE_TOKENS, MoveKind


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages of the device, or of host RAM, by state. They add up to all that there are."""

    free: int = 0
    used: int = 0
    cached: int = 0
    coming: int = 0
    leaving: int = 0

    @property
    def total(self) -> int:
        return self.free + self.used + self.cached + self.coming + self.leaving


@dataclass(frozen=True, slots=True)
class TierHits:
    """Pages that requests found instead of computing them, by the tier they were in."""

    device: int = 0
    host: int = 0
    nvme: int = 0

    def plus(self, other: "TierHits") -> "TierHits":
        return TierHits(self.device + other.device, self.host + other.host, self.nvme + other.nvme)

    @property
    def total(self) -> int:
        return self.device + self.host + self.nvme

    @property
    def tokens(self) -> "TierHits":
        """Tokens that were not computed, by tier."""
        return TierHits(*(PAGE_TOKENS * pages for pages in (self.device, self.host, self.nvme)))


@dataclass(frozen=True, slots=True)
class KVStats:
    """Pages now, and totals since the scheduler was made.

    `misses` are full pages that were looked for and computed. A preemption is `by_swap` when every
    full page of the request's is still to be had without computing it, else `by_recompute`. `cold` of
    the host's pages are held by requests that decode over them, and `sunk` more lie on NVMe for these;
    `spoiled` counts how often one of them had to begin again, because a page there was damaged.
    """

    device: PageCounts = field(default_factory=PageCounts)
    host: PageCounts = field(default_factory=PageCounts)
    nvme: int = 0
    hits: TierHits = field(default_factory=TierHits)
    misses: int = 0
    moved: Mapping[MoveKind, int] = field(default_factory=dict)
    lost: Mapping[MoveKind, int] = field(default_factory=dict)
    preempted_by_swap: int = 0
    preempted_by_recompute: int = 0
    evicted_from_device: int = 0
    evicted_from_host: int = 0
    cold: int = 0
    sunk: int = 0
    spoiled: int = 0
