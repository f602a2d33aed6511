"""The scheduler's choices as pure functions: who goes first, who gives way, who travels together.

A request's age is its id: of one rank, lower ids came earlier and have precedence everywhere. Lower ranks
have precedence over higher ones.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

from headrace.scheduler.config import KVCosts
from headrace.scheduler.plan import Adapter, MicroBatch, Slice, joined
from headrace.scheduler.request import Request
from headrace.scheduler.shares import Shares, line_of


def service_order(requests: Iterable[Request], shares: Shares) -> list[Request]:
    """Decodes before prefill chunks, each of the owner that had least first, and of one owner's the oldest.

    A decode costs one token and gives one to a user, so that a long prompt never holds it up.
    """

    def turn(request: Request) -> tuple[bool, int, int]:
        return request.num_pending > 1, shares.time(line_of(request)), request.request_id

    return sorted(requests, key=turn)


def choose_victim(running: Iterable[Request], needy: Request) -> Request | None:
    """Who gives its pages to `needy`: of those of a higher rank, or of its own and younger, the youngest
    of the highest rank, if there are any.

    Those in flight, which cannot go at once, come last. That only the younger give way to the older
    keeps the oldest request moving, whatever the others do.
    """
    younger = [request for request in running if request.precedence > needy.precedence]
    return _youngest(younger)


def choose_outranked(running: Iterable[Request], needy: Request) -> Request | None:
    """Who gives way so that `needy` is admitted: the youngest of those of a higher rank."""
    return _youngest([request for request in running if request.rank > needy.rank])


def choose_holders(
    running: Iterable[Request], needy: Request, leaving: Container[Request]
) -> list[Request]:
    """Who gives way so that `needy` has a slot for its adapter: all that run with some other adapter, if they all
    are of a higher rank; where there are several such adapters, the one that fewest have still to leave."""
    by_adapter: dict[Adapter, list[Request]] = {}
    for request in running:
        if request.adapter is not None:
            by_adapter.setdefault(request.adapter, []).append(request)
    outranked = [some for some in by_adapter.values() if all(r.rank > needy.rank for r in some)]
    left = [[request for request in some if request not in leaving] for some in outranked]
    return min(left, key=len, default=[])


def _youngest(requests: Iterable[Request]) -> Request | None:
    return max(requests, key=lambda r: (not r.passes, r.precedence), default=None)


def watermark(num_pages: int, num_running: int) -> int:
    """Pages that an admission leaves free, so that running requests can grow before one must go.

    One for every eight running requests lasts them eight decodes on average; leaving more costs
    concurrency and with it more than the preemptions that it saves.
    """
    if not num_running:
        return 0
    return max(-(-num_pages // 100), num_running // 8)


def best_prefix(gains: Iterable[float]) -> int:
    """How many pages from the first on to take, when taking page i instead of computing it gains
    gains[i] seconds: a page that costs more than it gains may have pages behind it that are there.

    Where it makes no difference they are taken: the device has other work.
    """
    count, total, most = 0, 0.0, 0.0
    for i, gain in enumerate(gains, 1):
        total += gain
        if total >= most:
            count, most = i, total
    return count


def swap_beats_recompute(costs: KVCosts) -> bool:
    """Whether a victim's full pages go to host RAM and come back, or are computed again.

    The newest page is computed again in any case.
    """
    return 2 * costs.host_page <= costs.computed_page


def hosting_pays(costs: KVCosts, num_pages: int, num_sunk: int = 0) -> bool:
    """Whether a request of so many full pages goes on decoding over them in host RAM, or with `num_sunk`
    of them on NVMe.

    Every pass has them brought over the link, which works for nobody else meanwhile, and gives one
    token for it. The request that does not go on waits, and gives none.
    """
    in_host = num_pages - num_sunk
    return in_host * costs.host_page + num_sunk * costs.nvme_page <= costs.decode


def guest_order(candidates: Iterable[Request]) -> list[Request]:
    """Who leaves the device first to go on over pages in host RAM: of the highest rank whoever frees the
    most pages, for it is brought no more bytes for each of them than another; of those the youngest."""
    return sorted(candidates, key=lambda r: (r.rank, r.num_named, r.request_id), reverse=True)


def clean_watermark(num_pages: int) -> int:
    """Pages that are to be had without losing a precious one, of `num_pages` in a tier.

    A sixteenth takes some passes' worth of new pages, so that write-backs stay ahead of them.
    """
    return -(-num_pages // 16)


def attention_work(piece: Slice) -> int:
    """Keys that the slice's tokens look at, summed: the token at position p sees p + 1 of them."""
    count = len(piece.tokens)
    return count * (piece.start + piece.end + 1) // 2


def pack(
    slices: Sequence[Slice], micro_batches: int, micro_batch_tokens: int, least_part: int = 0
) -> tuple[MicroBatch, ...]:
    """Share `slices` among micro-batches of like token counts and like attention work.

    Returns min(micro_batches, len(slices)) non-empty micro-batches of at most `micro_batch_tokens`
    tokens, each in the order of `slices`. Longest-processing-time greedy, where a load is the
    larger of its share of all tokens and its share of all attention work. The slices must fit when
    each in turn goes to the emptiest micro-batch (Draft sees to that): where balancing overflows a
    micro-batch, this is the packing that is used.

    With a `least_part`, prompts that have more than their share of the tokens are cut in parts of at least
    so many, unless these would not fit, each in a micro-batch behind that of the part before: a stage runs these
    in order, so that a part finds the keys of those before it.
    """
    parts = cut(slices, micro_batches, least_part) if least_part else slices
    if len(parts) > len(slices):
        bins = _balanced(parts, micro_batches, micro_batch_tokens)
        batches = () if bins is None else _in_order(parts, bins)
        if batches and all(batch.num_tokens <= micro_batch_tokens for batch in batches):
            return batches
    bins = _balanced(slices, micro_batches, micro_batch_tokens)
    if bins is None:
        in_turn, count = range(len(slices)), min(micro_batches, len(slices))
        bins = _fill(slices, in_turn, count, micro_batch_tokens, lambda tokens, _: tokens)
    assert bins is not None, "slices that Draft let in do not fit"
    return tuple(MicroBatch(tuple(slices[i] for i in sorted(members))) for members in bins)


def cut(slices: Sequence[Slice], count: int, least: int) -> list[Slice]:
    """Those of more tokens than one of `count` even shares in parts alike of at least `least` tokens, and no more parts than shares."""
    share = max(1, -(-sum(len(piece.tokens) for piece in slices) // count))
    parts = []
    for piece in slices:
        size = len(piece.tokens)
        number = min(-(-size // share), size // least, count)
        ends = [size * i // number for i in range(1, number)] if number > 1 else []
        parts += [piece.part(a, b) for a, b in pairwise([0, *ends, size])]
    return parts


def _in_order(parts: Sequence[Slice], bins: Sequence[Sequence[int]]) -> tuple[MicroBatch, ...]:
    """Parts of a request, as `parts` has them in their order, change places among the bins that have some of it: earlier
    ones go first, and those that meet in a bin are one again."""
    homes: dict[int, list[int]] = {}
    for number, members in enumerate(bins):
        for i in members:
            homes.setdefault(parts[i].request, []).append(number)
    filled: list[dict[int, list[Slice]]] = [{} for _ in bins]
    turns = {request: iter(numbers) for request, numbers in homes.items()}
    for piece in parts:
        filled[next(turns[piece.request])].setdefault(piece.request, []).append(piece)
    return tuple(MicroBatch(tuple(map(joined, some.values()))) for some in filled)


def _balanced(
    slices: Sequence[Slice], micro_batches: int, micro_batch_tokens: int
) -> list[list[int]] | None:
    """Which of the slices are in which micro-batch; None where they do not fit so."""
    count = min(micro_batches, len(slices))
    all_tokens = sum(len(piece.tokens) for piece in slices)
    all_work = sum(map(attention_work, slices))

    def share(tokens: int, work: int) -> int:  # times all_tokens * all_work, to stay in integers
        return max(tokens * all_work, work * all_tokens)

    largest_first = sorted(
        range(len(slices)),
        key=lambda i: -share(len(slices[i].tokens), attention_work(slices[i])),
    )
    return _fill(slices, largest_first, count, micro_batch_tokens, share)


def by_adapter(batch: MicroBatch) -> MicroBatch:
    """Slices of one adapter side by side, after those without: their rows are multiplied together."""
    if all(piece.adapter is None for piece in batch.slices):
        return batch
    slices = sorted(batch.slices, key=lambda s: -1 if s.adapter is None else s.adapter)
    return MicroBatch(tuple(slices))


def _fill(
    slices: Sequence[Slice],
    order: Iterable[int],
    count: int,
    capacity: int,
    load: Callable[[int, int], int],
) -> list[list[int]] | None:
    """Put each slice into the least loaded of `count` bins that has room; None when none has."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, work = [0] * count, [0] * count
    heap = [(0, b) for b in range(count)]
    heapify(heap)
    for i in order:
        size = len(slices[i].tokens)
        full = []
        while heap and tokens[heap[0][1]] + size > capacity:
            full.append(heappop(heap))
        if not heap:
            return None
        _, b = heappop(heap)
        bins[b].append(i)
        tokens[b] += size
        work[b] += attention_work(slices[i])
        for entry in (*full, (load(tokens[b], work[b]), b)):
            heappush(heap, entry)
    return bins
