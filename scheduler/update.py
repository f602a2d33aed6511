"""What a returned pass brought."""

from collections.abc import Iterable
from dataclasses import dataclass

from headrace.scheduler.plan import Sample
from headrace.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Update:
    """What a returned pass brought: the tokens it committed and the requests that these ended."""

    committed: list[tuple[Request, Sample]]
    finished: list[Request]


def by_request(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    """Each request's, in order."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.request, []).append(sample)
    return found
