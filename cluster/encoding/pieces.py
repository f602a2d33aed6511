"""Long texts tokenized in pieces, to the same tokens as whole.

A piece is tokenized together with `overlap` characters of what follows it, and ends where the next one
begins: at a *cut*, a place between two pre-tokens that looks like one of

    "\\n" | anything but white space            a letter | one space and a letter

Why the tokens are those of the whole text, for the components that `opening` lets pass:

- Added tokens are found first, scanning the raw (or normalized) text from the left. None spans a cut, or
  the tokenizer would show no pre-tokens that meet there; so a scan from the cut finds those that the scan
  of the whole text finds. One that looks at what stands before it (`single_word`) is an obstacle.
- Normalizers work on characters and combining sequences. Nothing combines with a line feed before it, or
  a space with a letter before it. Those that add or remove something where a text begins are obstacles.
- Pre-tokenizers split by classes of characters or by a pattern, from the left. One that never looks back
  (a look-behind, an anchor and a word boundary are obstacles) goes on from a place where it has split
  regardless of what was before. Where it splits before a cut depends on what follows only as far as it
  looks ahead, and patterns look to the end of a run of white space, digits, letters or other characters, which
  a cut ends. Those that put a space where a text begins are cut only where one is.
- Models see one pre-token at a time: merges, word pieces and the best unigrams never span two.

What this says of a pattern's looking ahead cannot be read off it. So two things are checked: each
tokenizer, when it is opened, on a text made to be hard; and each cut, by the tokens after it, which the piece
before has tokenized with what precedes them, and the piece after without. A text with a cut that fails is
tokenized whole.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from headrace.cluster.encoding.piece_cache import Piece, PieceCache

WINDOW = 4096
"""Characters that are tokenized at once: enough that the overlap costs little, and few enough that most of a
system prompt is whole pieces, which are found again."""

OVERLAP = 128
WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
LINES_OR_WORDS = re.compile(rf"(?<=\n)(?=\S)|{WORDS.pattern}")
_STRIDE = 512
"""Characters that are looked through for cuts at once."""


class SeamError(Exception):
    """A text's tokens are other ones when it is cut."""


class Pieces:
    """Tokenizes texts in pieces. Any thread may call it.

    `core` tokenizes without special tokens, and `around` are those that stand before and after a text.
    A piece is of `window` characters, or more where they cannot be cut.
    """

    def __init__(
        self,
        core: Tokenizer,
        around: tuple[array[int], array[int]],
        cuts: re.Pattern[str],
        overlap: int,
        window: int,
    ) -> None:
        self._core, self._around, self._cuts = core, around, cuts
        self._overlap, self._window = overlap, window

    def encode(
        self, text: str, cache: PieceCache, tenant: str = "", *, special: bool
    ) -> Iterator[array[int]]:
        """Token ids, piece by piece. SeamError when those that have come are not the text's."""
        before, after = self._around if special else (array("i"), array("i"))
        start, seam = 0, array("i")
        yield before
        while start < len(text):
            piece = self._next(text, start, cache, tenant)
            if piece.token_ids[: len(seam)] != seam:
                raise SeamError
            yield piece.token_ids
            start, seam = start + piece.length, piece.seam
        yield after

    def _next(self, text: str, start: int, cache: PieceCache, tenant: str) -> Piece:
        size = self._window
        while start + size < len(text):
            window = text[start : start + size]
            piece = cache.get(tenant, window)
            if piece is not None:
                return piece
            piece = self._first(window)
            if piece is not None:
                cache.put(tenant, window, piece)
                return piece
            size *= 2  # one that cannot be cut is tokenized whole in the end
        rest = self._tokenize(text[start:])
        return Piece(array("i", rest.ids), len(text) - start, array("i"))

    def _tokenize(self, text: str) -> Any:
        # Of the two calls, only the one for a batch lets other threads run.
        return self._core.encode_batch([text], add_special_tokens=False)[0]

    def _first(self, window: str) -> Piece | None:
        """None when it has no cut that leaves enough on both sides to compare."""
        encoded = self._tokenize(window)
        for place in self._places(window):
            token = _beginning(encoded, place)
            if token is None:
                continue
            after = _whole_until(encoded, token, place + self._overlap // 2)
            if after > token:
                ids = encoded.ids
                return Piece(array("i", ids[:token]), place, array("i", ids[token:after]))
        return None

    def _places(self, window: str) -> Iterator[int]:
        """Where it may be cut, the last ones first."""
        low, high = self._overlap, len(window) - self._overlap
        while low < high:
            start = max(low, high - _STRIDE)
            found = [match.start() for match in self._cuts.finditer(window, start, high)]
            yield from reversed(found)
            high = start


def _beginning(encoded: Any, place: int) -> int | None:
    """The token that begins at a cut, where a pre-token does."""
    token = encoded.char_to_token(place)
    if token is None:  # a space that is part of no token
        token = encoded.char_to_token(place + 1)
    if not token:
        return None
    end, begin = encoded.token_to_chars(token - 1)[1], encoded.token_to_chars(token)[0]
    is_first = encoded.token_to_word(token - 1) != encoded.token_to_word(token)
    return token if is_first and end <= place <= begin else None


def _whole_until(encoded: Any, token: int, end: int) -> int:
    """How far, from a token that begins one, there are pre-tokens that end by `end`. The one across it may
    be shortened by the end of the window, and then has other tokens from its first."""
    after = token
    while (span := encoded.token_to_chars(after)) is not None and span[1] <= end:
        after += 1
    while after > token and encoded.token_to_word(after - 1) == encoded.token_to_word(after):
        after -= 1
    return after
