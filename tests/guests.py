"""Requests that decode, as tests of who goes on over pages that are not on the device need them."""

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.plan import PAGE_TOKENS, MoveKind
from headrace.scheduler.request import Request, SamplingParams

CONFIG = SchedulerConfig(
    num_pages=12,
    max_context=10 * PAGE_TOKENS,
    token_budget=512,
    max_sequences=8,
    micro_batches=2,
    micro_batch_tokens=256,
    host_pages=20,
    kv_ring_pages=8,
    cold_micro_batches=2,
)


def computed(holdings: Holdings, number: int, pages: int, *, first: int = 0) -> Request:
    """A request that has computed so many full pages of its own, and decodes."""
    tokens = [first] * (pages * PAGE_TOKENS + 1)
    request = Request(number, tokens, SamplingParams(max_tokens=20), seed=0)
    assert holdings.admit(request, len(tokens), 0)
    request.num_scheduled = pages * PAGE_TOKENS
    holdings.name(request, request.num_scheduled)
    return request


def end_moves(holdings: Holdings, *, lost: bool = False) -> list[MoveKind]:
    moves = holdings.take_moves()
    numbers = [move.number for move in moves]
    holdings.settle([] if lost else numbers, numbers if lost else [])
    return [move.kind for move in moves]
