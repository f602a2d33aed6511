"""Pieces of texts that were tokenized lately: many conversations begin with the same pages."""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass

CACHE_BYTES = 32 << 20
_ENTRY = 512
"""Bytes of an entry beside its text and tokens, roughly."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a text's first `length` characters, and those that the rest has to begin with."""

    token_ids: array[int]
    length: int
    seam: array[int]


class PieceCache:
    """What became of each tenant's texts, the least recently used ones dropped. Any thread may call it.

    Tenants do not share: how soon an answer begins would tell one what another has asked. Texts are
    compared whole, not by a hash.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._pieces: OrderedDict[tuple[str, str], Piece] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def get(self, tenant: str, text: str) -> Piece | None:
        with self._lock:
            piece = self._pieces.get((tenant, text))
            if piece is not None:
                self._pieces.move_to_end((tenant, text))
            return piece

    def put(self, tenant: str, text: str, piece: Piece) -> None:
        """Keep it; one that would take more than an eighth of the room is not."""
        size = _size(text, piece)
        if size > self._max_bytes // 8:
            return
        with self._lock:
            if (tenant, text) in self._pieces:
                return
            self._pieces[tenant, text] = piece
            self._bytes += size
            while self._bytes > self._max_bytes:
                (_, oldest), dropped = self._pieces.popitem(last=False)
                self._bytes -= _size(oldest, dropped)


def _size(text: str, piece: Piece) -> int:
    return sys.getsizeof(text) + sys.getsizeof(piece.token_ids) + _ENTRY
