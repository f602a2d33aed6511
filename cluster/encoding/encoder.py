"""Texts to token ids."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from typing import Any

from headrace.cluster.encoding.opening import open_pieces
from headrace.cluster.encoding.piece_cache import PieceCache
from headrace.cluster.encoding.pieces import WINDOW, Pieces, SeamError
from headrace.scheduler.errors import ContextLengthError

logger = logging.getLogger(__name__)


class Encoder:
    """Tokenizes texts as a transformers tokenizer does, but in pieces: in little memory, up to where a
    text is known to be too long, and without doing again what was done lately. Any thread may call it.

    Pieces are taken from `window` characters at a time. A tokenizer that cannot do it in pieces does it
    whole, and the log says why.
    """

    def __init__(self, tokenizer: Any, *, window: int = WINDOW) -> None:
        # A fast tokenizer that was saved with truncation drops that at its first call, and is only
        # then safe to use by several threads at once.
        tokenizer("")
        self.tokenizer = tokenizer
        self._pieces, self._cache = open_pieces(tokenizer, window), PieceCache()
        if isinstance(self._pieces, str):
            logger.warning("the tokenizer takes long texts whole: %s", self._pieces)

    @property
    def is_whole(self) -> bool:
        """Whether every text is tokenized whole."""
        return isinstance(self._pieces, str)

    def encode(
        self, text: str, *, special: bool = True, context: int | None = None, tenant: str = ""
    ) -> array[int]:
        """Token ids, with those that the tokenizer puts around a text where they are `special`.

        ContextLengthError as soon as there are more than `context` and the text goes on. Raises whatever
        the tokenizer does. What a tenant's texts became helps no other tenant.
        """
        if isinstance(self._pieces, Pieces):
            try:
                parts = self._pieces.encode(text, self._cache, tenant, special=special)
                return _joined(parts, context)
            except SeamError:
                logger.info("a text of %d characters is tokenized whole", len(text))
        return array("i", self.tokenizer(text, add_special_tokens=special)["input_ids"])


def _joined(parts: Iterable[array[int]], context: int | None) -> array[int]:
    token_ids = array("i")
    for part in parts:
        if part and context is not None and len(token_ids) > context:
            raise ContextLengthError(
                f"the prompt has more than {context} tokens, which is all of the context: shorten it or"
                " raise --context"
            )
        token_ids += part
    return token_ids
