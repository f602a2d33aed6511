"""Token ids back to text: incrementally while looking for stop strings, whole at the end."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from headrace.scheduler.request import SamplingParams


class StopStrings:
    """Follows one request's text and says when a stop string has appeared.

    Only requests that have stop strings pay for incremental decoding.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self._stop = params.stop
        self._keep = params.include_stop_str_in_output
        self._text = ""

    def push(self, token: int) -> str | None:
        """The final text, cut at the first stop string, once one has appeared; else None."""
        piece = self._stream.step(self._backend, token)
        if not piece:
            return None
        # A stop string may straddle the seam, but cannot end before the new piece.
        window = max(len(stop) for stop in self._stop) + len(piece) - 1
        self._text += piece
        start = max(0, len(self._text) - window)
        found = [(self._text.find(stop, start), stop) for stop in self._stop]
        hits = [(at, stop) for at, stop in found if at >= 0]
        if not hits:
            return None
        at, stop = min(hits)
        return self._text[: at + len(stop)] if self._keep else self._text[:at]


def decode(tokenizer: Any, token_ids: Sequence[int], params: SamplingParams) -> str:
    """The text of a finished request's output."""
    text: str = tokenizer.decode(
        list(token_ids),
        skip_special_tokens=params.skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    return text
