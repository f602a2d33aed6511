"""What is asked of the planner, and what of a layout follows from it."""

from dataclasses import dataclass, replace

from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape
from headrace.scheduler.kv_room import most_window_pages
from headrace.scheduler.layouts import with_graphs
from headrace.scheduler.links import Links
from headrace.scheduler.memory import (
    Cache,
    Layout,
    graph_bytes,
    host_pages,
    kv_ring_bytes,
    least_memory,
    lendable_slots,
    page_bytes,
    tail_bytes,
)
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import PAGE_TOKENS

ACTIVATIONS_SHARE = 8
"""Passes are cut until activations take at most one part in so many of the device budget."""

PAGES_SHARE = 4
"""And until so many times what they take is left beside the least of the weights."""

RING_SHARE = 16
"""A KV ring takes at most one part in so many of the device budget."""

COLD_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Micro-batches that guests may be shared among: each has the weights read again in device memory."""

GRAPHS_SHARE = 64
"""CUDA graphs take at most one part in so many of the device budget, unless they were asked for."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that a plan depends on: one profile and one budget for each stage, and their links."""

    shape: ModelShape
    profiles: tuple[DeviceProfile, ...]
    budgets: tuple[Budget, ...]
    context: int
    max_sequences: int | None
    min_sequences: int
    choices: Choices
    links: Links

    def cache(self, sequences: int) -> Cache:
        """Room for that many sequences of the context."""
        return Cache(sequences, pages_for(self.context))

    @property
    def full_pages(self) -> int:
        """Pages of a sequence of the context that are full."""
        return max(0, self.context - 1) // PAGE_TOKENS

    @property
    def old_pages(self) -> int:
        """Those of them that may lie on NVMe."""
        window = self.choices.kv_hot_window
        return 0 if window is None else max(0, self.context - 1 - window) // PAGE_TOKENS

    def lendable(self, layout: Layout, cache: Cache) -> int:
        """Host slots that guests may hold."""
        return lendable_slots(host_pages(self.shape, layout, self.budgets, cache))

    def hosting(self, layout: Layout, guests: int) -> Cache | None:
        """Room for so many guests, those of whose pages that have none in host RAM on NVMe; None where
        there is none."""
        cache = self._ring(layout, guests)
        if cache is None or guests * self.full_pages <= self.lendable(layout, cache):
            return cache
        most = most_window_pages(self.shape, layout, self.budgets)
        cache = replace(cache, window_pages=min(most, guests * self.old_pages))
        sunk = guests * self.full_pages - self.lendable(layout, cache)
        return None if sunk > cache.window_pages else replace(cache, sunk=sunk)

    def most_guests(self, layout: Layout) -> tuple[int, int]:
        """The most for whom there is room in host RAM, and with NVMe beside it."""
        full, slots = self.full_pages, self.lendable(layout, self.cache(0))
        if not full:
            return 0, 0
        in_host = slots // full
        if not self.old_pages:
            return in_host, in_host
        below = most_window_pages(self.shape, layout, self.budgets)
        low, high = in_host, (slots + below) // full
        while low < high:  # staging takes of what host RAM holds, the more the larger the ring is
            guests = -(-(low + high) // 2)
            if self.hosting(layout, guests) is None:
                high = guests - 1
            else:
                low = guests
        return in_host, low

    def _ring(self, layout: Layout, guests: int) -> Cache | None:
        """A ring for so many guests, in as few micro-batches as it may be large; None where even one of
        them takes a larger ring than that."""
        pages = pages_for(self.context)
        a_pass = -(-guests // layout.passes_in_flight)
        for batches in COLD_BATCHES:
            together = -(-a_pass // batches)
            sizes = (
                kv_ring_bytes(self.shape, layout, stage, together * pages)
                for stage in range(layout.num_stages)
            )
            small = all(
                size * RING_SHARE <= budget.device_memory
                for size, budget in zip(sizes, self.budgets, strict=True)
            )
            if small and together <= layout.micro_batch_tokens:
                return Cache(0, pages, guests, -(-a_pass // together), together * pages)
        return None

    def wanted(self, layout: Layout) -> int:
        """Sequences at once, over all passes in flight, beyond which none can be scheduled."""
        a_pass = self.choices.max_sequences or layout.token_budget
        total = min(a_pass, layout.token_budget) * layout.passes_in_flight
        return min(total, self.max_sequences or total)

    def fits(self, layout: Layout) -> bool:
        """Whether every stage has room for one sequence beside the least of the weights."""
        memory = (
            least_memory(self.shape, layout, stage, self.cache(1))
            for stage in range(layout.num_stages)
        )
        return all(m.device <= b.device_memory for m, b in zip(memory, self.budgets, strict=True))

    def is_roomy(self, layout: Layout) -> bool:
        """Whether activations leave most of every budget to pages and layers, and pages several times
        what they take themselves."""
        memory = (
            least_memory(self.shape, layout, stage, self.cache(0))
            for stage in range(layout.num_stages)
        )
        return all(
            m.activations * ACTIVATIONS_SHARE <= b.device_memory
            and m.device + PAGES_SHARE * m.activations <= b.device_memory
            for m, b in zip(memory, self.budgets, strict=True)
        )

    def graphed(self, layout: Layout) -> Layout:
        """The layout with as many lanes of CUDA graphs as are wanted and small beside the budgets."""
        wanted = with_graphs(layout, self.profiles[0].kind, self.choices)
        if not wanted.graph_lanes:
            return layout
        one = replace(wanted, graph_lanes=1)
        lanes = min(
            budget.device_memory // (GRAPHS_SHARE * graph_bytes(self.shape, one, stage))
            for stage, budget in enumerate(self.budgets)
        )
        lanes = min(lanes, wanted.graph_lanes)
        return replace(wanted, graph_lanes=lanes) if lanes > layout.graph_lanes else layout

    def most_sequences(self, layout: Layout, guests: Cache | None = None) -> int:
        """Sequences whose keys and values every stage can hold beside the least of the weights, and
        beside what `guests` need."""
        none = guests or self.cache(0)

        def most(stage: int, budget: Budget) -> int:
            least = least_memory(self.shape, layout, stage, none).device
            pages = self.cache(1).pages * page_bytes(self.shape, layout, stage)
            return (budget.device_memory - least) // (pages + tail_bytes(self.shape, layout, stage))

        return min(most(stage, budget) for stage, budget in enumerate(self.budgets))
