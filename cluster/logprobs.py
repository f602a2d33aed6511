"""Log-probabilities of tokens, as OpenAI's APIs list them.

A token need not be text: it may be some bytes of a character. What clients are shown of it is its own bytes,
so that those of all tokens together are the text.
"""

import re
from collections.abc import Sequence
from typing import Any

from headrace.cluster.detokenize import HALF, TextStream
from headrace.cluster.rows import Kind
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _alphabet() -> dict[str, int]:
    """Bytes by the characters that byte-level vocabularies write for them, which are GPT-2's: printable ones
    of Latin-1 for themselves, the others from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _alphabet()


class LogprobLists:
    """One sequence's, whose samples are given in order, at once or in parts that end between characters."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = TextStream(tokenizer, params)
        self._count = self._offset = 0  # tokens until now, and characters of their text

    def listed(self, kind: Kind, samples: Sequence[Sample]) -> dict[str, Any]:
        """Those of the next samples."""
        return self._completion(samples) if kind is Kind.COMPLETION else self._chat(samples)

    def _chat(self, samples: Sequence[Sample]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            data = self._data(token)
            return {"token": _shown(data, ""), "logprob": logprob, "bytes": list(data)}

        content = []
        for sample in samples:
            top = [entry(token, logprob) for token, logprob in sample.top]
            content.append({**entry(sample.token, sample.logprob), "top_logprobs": top})
            self._count += 1
        return {"content": content}

    def _completion(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A token's offset is that of the character that it begins or goes on with."""
        tokens, top, offsets = [], [], []
        for sample in samples:
            tokens.append(_shown(self._data(sample.token), "bytes:"))
            top.append({_shown(self._data(t), "bytes:"): value for t, value in sample.top})
            offsets.append(self._offset)
            self._offset += len(self._stream.push(sample.token))
            self._count += 1
        return {
            "tokens": tokens,
            "token_logprobs": [sample.logprob for sample in samples],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _data(self, token: int) -> bytes:
        """What the token's own part of the text is, in UTF-8, were it the next one."""
        alone = self._decode([token])
        if HALF in alone and (data := _own_bytes(self._tokenizer.id_to_token(token))) is not None:
            return data
        if self._count:
            # Some decoders drop a space that a text begins with.
            pair = self._decode([token, token])
            alone = pair[len(alone) :] if pair.startswith(alone) else alone
        return alone.encode("utf-8", "replace")

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def _own_bytes(name: str) -> bytes | None:
    """Of a token that decodes to no text, by its name in a vocabulary with bytes; None where that has none."""
    if (byte := _BYTE.fullmatch(name)) is not None:
        return bytes.fromhex(byte[1])
    if all(character in _BYTES for character in name):
        return bytes(_BYTES[character] for character in name)
    return None


def _shown(data: bytes, mark: str) -> str:
    """Text, or where it is none, behind the `mark`, with bytes that are no ASCII as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return mark + "".join(chr(byte) if byte < 0x80 else f"\\x{byte:02x}" for byte in data)
