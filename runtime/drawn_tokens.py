"""Tokens that were not known when a pass was made, for the stages that embed or sample."""

from collections import deque
from collections.abc import Mapping

from headrace.runtime.sampler import Row
from headrace.scheduler.errors import StageError
from headrace.scheduler.plan import MicroBatch, PassResult, Sampling, Slice

Tokens = Mapping[int, int]
"""What each request drew."""


class DrawnTokens:
    """What each request drew last in the newest passes; older ones are followed by none to come.

    A pass follows one of the `passes_in_flight` before it, for it is made while that one and at most
    so many are in flight.
    """

    def __init__(self, passes_in_flight: int) -> None:
        self._passes: deque[tuple[int, Tokens]] = deque(maxlen=passes_in_flight)

    def note(self, result: PassResult) -> None:
        """Remember what a pass drew."""
        if result.samples:
            tokens = {sample.request: sample.token for sample in result.samples}
            self._passes.append((result.step, tokens))

    def before(self, step: int, follows: int | None) -> Tokens:
        """What the pass drew that pass `step` follows; nothing where it follows none.

        Raises StageError when that pass was not noted: it failed.
        """
        if follows is None:
            return {}
        drawn = dict(self._passes).get(follows)
        if drawn is None:
            raise StageError(f"pass {step} follows pass {follows}, which failed")
        return drawn


def sampled_rows(micro_batch: MicroBatch, drawn: Tokens) -> list[Row]:
    """What to draw after a micro-batch's slices, and after their drafts, with histories that are whole."""
    return [
        (piece.request, piece.known_end + i, _whole(piece.sampling, piece, i, drawn))
        for piece in micro_batch.slices
        if piece.sampling is not None
        for i in range(piece.num_drawn)
    ]


def _whole(sampling: Sampling, piece: Slice, num_drafts: int, drawn: Tokens) -> Sampling:
    """For the token after the first drafts of a slice."""
    if not sampling.history:
        return sampling
    more = (drawn[piece.request],) if piece.follows else piece.drafts[:num_drafts]
    return sampling._replace(history=(*sampling.history, *more)) if more else sampling
