"""What a run had to do: how many sequences, how long, and how many of them another plan would run at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from headrace.cluster.explain.report import RunReport
from headrace.scheduler.inputs import DEFAULT_CONTEXT
from headrace.scheduler.memory import lendable_slots
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Plan

FEWER = 0.95
"""With less than this share of the sequences that a plan allows, something else bound them."""

LEAST_WAITING = 0.05
"""A share of the passes in which requests wait: fewer are those in which they are being let in."""

WAVES = 4
"""Up to one in so many of the requests at once differ in how far they are, and hold their pages of the average.
Of more, most start together and have their most pages together."""


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` in all, `sequences` of which ran at once: over all passes in flight, with `context` tokens
    in `pages` KV pages each on average, the longest ever with `longest` in `most_pages`. `waited`: others
    were waiting."""

    requests: int
    sequences: int
    context: int
    pages: float
    most_pages: float
    longest: int
    waited: bool

    @classmethod
    def of(cls, report: RunReport, plan: Plan) -> "Load":
        """Of a run by `plan`; what was planned, where no pass had decodes only."""
        decode = report.decode
        if decode is None:
            planned = report.inputs.workload.context or DEFAULT_CONTEXT
            context = min(planned, report.inputs.shape.max_context)
            sequences = plan.prediction.sequences
            each = _pages(plan) / sequences
            requests = max(report.requests, sequences)
            return cls(requests, sequences, context, each, each, context, waited=True)
        sequences = decode.sequences * plan.passes_in_flight
        waited = decode.waiting >= LEAST_WAITING
        share = _pages(plan) / sequences  # more than that nobody had: sequences may share pages
        pages_bound = waited and sequences < FEWER * _most(plan)
        pages = share if pages_bound else min(decode.pages, share)
        most = share if pages_bound else min(pages_for(report.longest), share)
        requests = max(report.requests, sequences)
        return cls(requests, sequences, decode.context, pages, most, report.longest, waited)

    def room(self, plan: Plan, *, by_number: bool = True) -> int:
        """How many sequences like these the plan has at once if there are as many: its pages hold them, and
        `by_number` its passes take them."""
        pages = _pages(plan)
        held = max(pages / self.most_pages, min(pages / self.pages, self.requests / WAVES))
        room = min(math.floor(held + 1e-9), plan.token_budget * plan.passes_in_flight)
        return max(1, min(room, _most(plan)) if by_number else room)

    def at_once(self, plan: Plan) -> int:
        """How many of those that there were: where none waited for room, more room brings nothing."""
        return min(self.room(plan), self.requests if self.waited else self.sequences)

    def resized(self, length: float) -> "Load":
        """With sequences so many times as long."""
        context = max(1, round(length * self.context))
        return replace(
            self,
            context=context,
            pages=max(1.0, length * self.pages),
            most_pages=max(1.0, length * self.most_pages),
            longest=round(length * self.longest),
        )

    def rate(self, sequences: int, seconds: Callable[[int], float]) -> float:
        """Tokens a second of the whole job where so many run at once, and `seconds` are what a round of how
        many takes. Requests are taken to be equally long: the last of them are fewer."""
        whole, rest = divmod(self.requests, sequences)
        total = whole * seconds(sequences) + (seconds(rest) if rest else 0.0)
        return self.requests / total


def _most(plan: Plan) -> int:
    """Sequences that passes take at once, whatever their lengths: with quantized pages each has a tail."""
    most = min(plan.max_sequences, plan.token_budget) * plan.passes_in_flight
    return min(most, plan.num_tails) if plan.num_tails else most


def _pages(plan: Plan) -> int:
    """Those that sequences can decode over: on the device, and in slots below it where there is a KV ring."""
    below = lendable_slots(plan.host_pages) + plan.window_pages if plan.kv_ring_pages else 0
    return plan.num_pages + below
