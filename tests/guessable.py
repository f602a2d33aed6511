"""A model of a few words that often says what can be guessed, and what it says of drafts."""

from collections.abc import Sequence

from headrace.scheduler.plan import Sample, Slice
from headrace.scheduler.speculation import num_accepted

VOCABULARY = 50


def next_token(context: Sequence[object]) -> int:
    """The next token depends on every token before it, and on nothing else; three in four times it is
    the one that goes on round a small circle."""
    value = hash(tuple(context))
    if value % 4 == 0:
        return value // 4 % VOCABULARY
    return 10 + hash(context[-1]) % 3


def draw(piece: Slice, context: Sequence[object]) -> list[Sample]:
    """What a stage returns of a slice whose tokens are the last of `context`: none, if it draws none."""
    first = len(context) - piece.num_drafts
    ends = range(first, first + piece.num_drawn)
    drawn = [next_token(context[:end]) for end in ends]
    count = num_accepted(piece.drafts, drawn) + 1
    return [Sample(piece.request, token, None, ()) for token in drawn[:count]]
