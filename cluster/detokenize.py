"""Token ids back to text: as they come, looking for stop strings on the way, and whole at the end."""

from collections.abc import Sequence
from typing import Any

from headrace.scheduler.request import SamplingParams

HALF = "\ufffd"
"""What decoders write for bytes that are no character, or not yet one."""

_HELD = 24
"""Tokens that may be held back because they end in half a character. Real ones need four at most."""


class TextStream:
    """Turns one request's tokens into pieces of text that end between characters.

    What a token means may depend on the one before it (a space, a byte of a character), so the tokens
    of the newest piece are decoded again together with those that follow.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._skip_special = params.skip_special_tokens
        self._before: list[int] = []
        self._before_text = ""
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that the token completes; empty while that ends in half a character."""
        self._held.append(token)
        piece = self._piece()
        if len(self._held) < _HELD and (not piece or piece.endswith(HALF)):
            return ""
        if piece:
            self._before, self._before_text = self._held, self._decode(self._held)
        self._held = []
        return piece

    def flush(self) -> str:
        """The text of the tokens that are held back, as it is. Nothing may follow."""
        return self._piece() if self._held else ""

    def _piece(self) -> str:
        text = self._decode(self._before + self._held)
        if text.startswith(self._before_text):
            return text[len(self._before_text) :]
        # Bytes that broke up the character before them. That one has been given out.
        return self._decode(self._held)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
        return text


class StopStrings:
    """Follows one request's text and says when a stop string has appeared.

    Only requests that have stop strings pay for incremental decoding.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._stream = TextStream(tokenizer, params)
        self._stop = params.stop
        self._keep = params.include_stop_str_in_output
        self._text = ""

    def push(self, token: int) -> str | None:
        """The final text, cut at the first stop string, once one has appeared; else None."""
        piece = self._stream.push(token)
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


class TextDeltas:
    """One request's text in pieces that can be shown: none has to be taken back.

    Besides half characters, what may be the beginning of a stop string is held back until it is known
    to be none. All pieces together are the request's text.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._stream = TextStream(tokenizer, params)
        self._stop = params.stop
        self._sent: list[str] = []
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be shown now."""
        text = self._held + self._stream.push(token)
        cut = len(text) - _beginning(text, self._stop)
        self._held = text[cut:]
        self._sent.append(text[:cut])
        return text[:cut]

    def finish(self, final: str, left: Sequence[int]) -> str:
        """The last piece, of a request whose whole text is `final`; `left` are tokens of it that have
        not been pushed."""
        sent = "".join(self._sent)
        if final.startswith(sent):
            return final[len(sent) :]
        # Bytes that are no text may be decoded otherwise once all of them are known.
        rest = "".join(map(self._stream.push, left))
        return self._held + rest + self._stream.flush()


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string, not all of it."""
    longest = min(len(text), max((len(stop) for stop in stops), default=0) - 1)
    for length in range(longest, 0, -1):
        end = text[len(text) - length :]
        if any(stop.startswith(end) for stop in stops if len(stop) > length):
            return length
    return 0


def decode(tokenizer: Any, token_ids: Sequence[int], params: SamplingParams) -> str:
    """The text of a finished request's output."""
    text: str = tokenizer.decode(
        list(token_ids),
        skip_special_tokens=params.skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    return text
