"""What a load found out about a server."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from headrace.cluster.bench.serve_load import Load, Sent, connected, run_load
from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; of `count` values."""

    count: int
    p50: float
    p95: float
    p99: float


def quantiles(values: Sequence[float]) -> Quantiles | None:
    if not values:
        return None
    p50, p95, p99 = (float(each) for each in np.percentile(values, (50, 95, 99)))
    return Quantiles(len(values), p50, p95, p99)


@dataclass(frozen=True, slots=True)
class Report:
    """Of requests that were due after the warm-up. Rates are of what came within the load's duration.

    `first` is the time to the first token, `between` that between two pieces of a stream, `whole` that of
    all of an answer, `refused` how long a client waited to be told 429. `in_time` is the part of the
    requests let in that met the load's times; goodput counts no others.
    """

    load: Load
    requests: int
    answered: int
    reasons: dict[str, int]
    first: Quantiles | None
    between: Quantiles | None
    whole: Quantiles | None
    refused: Quantiles | None
    in_time: float | None
    requests_per_second: float
    tokens_per_second: float
    good_requests_per_second: float
    good_tokens_per_second: float
    tokens_per_second_by_key: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """Without the keys."""
        told = asdict(self)
        told["load"]["keys"] = len(self.load.keys)
        return told


def report(load: Load, everything: Sequence[Sent]) -> Report:
    counted = [sent for sent in everything if sent.due >= load.warmup]
    answered = [sent for sent in counted if sent.reason is None]
    let_in = [sent for sent in counted if sent.status == 200]
    good = [sent for sent in counted if sent.is_good(load)]
    ended = [s for s in everything if s.reason is None and load.warmup <= s.ended <= load.end]
    ended_well = [sent for sent in ended if sent.is_good(load)]
    came: Counter[int] = Counter()
    for sent in everything:
        came[sent.key] += sum(load.warmup <= at <= load.end for at in sent.pieces)
    by_key = tuple(came[key] / load.duration for key in range(len(load.keys)))
    return Report(
        load=load,
        requests=len(counted),
        answered=len(answered),
        reasons=dict(Counter(sent.reason for sent in counted if sent.reason).most_common()),
        first=quantiles([sent.first for sent in counted if sent.pieces]),
        between=quantiles([b - a for sent in answered for a, b in pairwise(sent.pieces)]),
        whole=quantiles([sent.whole for sent in answered]),
        refused=quantiles([sent.ended - sent.began for sent in counted if sent.status == 429]),
        in_time=len(good) / len(let_in) if let_in else None,
        requests_per_second=len(ended) / load.duration,
        tokens_per_second=sum(by_key),
        good_requests_per_second=len(ended_well) / load.duration,
        good_tokens_per_second=sum(sent.tokens for sent in ended_well) / load.duration,
        tokens_per_second_by_key=by_key,
    )


async def run_loads(url: str, loads: Sequence[Load], told: Callable[[Load], None]) -> list[Report]:
    """One load after the other; `told` is called before each. HeadraceError when there is no server, or its
    sequences cannot have as many tokens."""
    reports = []
    async with connected(url, loads[0].keys[0]) as (client, longest):
        most = loads[0].prompt + loads[0].output
        if most > longest:
            raise HeadraceError(
                f"--prompt {loads[0].prompt} and --new {loads[0].output} are {most} tokens, and the"
                f" server's sequences have {longest} at most: use less, or serve with more --context"
            )
        for load in loads:
            told(load)
            reports.append(report(load, await run_load(client, load)))
    return reports
