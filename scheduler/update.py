"""What a returned pass brought."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from headrace.scheduler.plan import Sample
from headrace.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Update:
    """What a returned pass brought: the tokens it committed and the requests that these ended, and those that
    ended because their adapter could not be loaded, with the load's number."""

    committed: list[tuple[Request, Sample]]
    finished: list[Request]
    without_adapter: list[tuple[Request, int]] = field(default_factory=list)


def by_request(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    """Each request's, in order."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.request, []).append(sample)
    return found
