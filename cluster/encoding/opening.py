"""Which tokenizers may tokenize in pieces, and how (`pieces` says why)."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from random import Random
from typing import Any

from tokenizers import Tokenizer

from headrace.cluster.encoding.piece_cache import PieceCache
from headrace.cluster.encoding.pieces import LINES_OR_WORDS, OVERLAP, WORDS, Pieces, SeamError

_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
)
_PRE_TOKENIZERS = frozenset(
    {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace"}
    | {"Punctuation", "Split", "Whitespace", "WhitespaceSplit"}
)
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_LOOKS_BACK = re.compile(r"\(\?<|\\[bBAGKyYzZ]|[\^$]")
_UNCUT = 3
"""What there is of a text in one piece: that, and what stands before and after it."""
_HARD = (
    "The quick brown fox can't jump, he'll sleep; we've seen IT'S Ünïcödé naïve straße",
    "    def f(x):\r\n\t\treturn x**2  # n\u00b0 1\r\n\r\n\n\n   \n",
    " " * 40 + "\t \u00a0\u3000 \n \n",
    "1234567890 3.14159 1,000,000 0x1F600 \u0661\u0662\u0663 \u00bd",
    "今天天气很好。\n我们去公园吧。\n日本語のテキスト、한국어 텍스트 \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 o\u0308\n\u0301a \u0323x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    'https://example.org/a?b=c&d=%20#e {"k": [1, null]} <b>x</b> --- === ///\n/// \u2581x',
    "Привет, мир! Жил был кот\n\u0634\u0643\u0631\u0627 \u0644\u0643\u0645\nनमस्ते दुनिया यह है",
)


def open_pieces(tokenizer: Any, window: int) -> Pieces | str:
    """How a transformers tokenizer can tokenize in pieces, or why it cannot. Takes some milliseconds."""
    backend = tokenizer.backend_tokenizer
    if (reason := _obstacle(backend)) is not None:
        return reason
    core, around = _core(backend), _around(tokenizer)
    if core is None or around is None:
        return "its added or special tokens are not where they are looked for"
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    overlap = max(OVERLAP, 4 * max(map(len, added), default=0))
    cuts = WORDS if _puts_spaces(backend.pre_tokenizer) else LINES_OR_WORDS
    for seed in range(3):
        trial = Pieces(core, around, cuts, overlap, window=3 * overlap + seed)
        text = _hard_text(added, seed, 12 * overlap)
        try:
            parts = list(trial.encode(text, PieceCache(0), special=True))
        except SeamError:
            parts = []
        if [token for part in parts for token in part] != tokenizer(text)["input_ids"]:
            return "its tokens are other ones when a text is cut"
        if len(parts) == _UNCUT:
            return "it does not split texts at lines and words"
    return Pieces(core, around, cuts, overlap, window)


def _obstacle(backend: Tokenizer) -> str | None:
    for part in _parts(backend.normalizer, "normalizers"):
        if part["type"] not in _NORMALIZERS and not _replaces_a_character(part):
            return f"its normalizer {part['type']} may look at more than a character"
    if backend.pre_tokenizer is None:
        return "it does not split texts before it merges"
    for part in _parts(backend.pre_tokenizer, "pretokenizers"):
        if part["type"] not in _PRE_TOKENIZERS:
            return f"its pre-tokenizer {part['type']} is not known to split regardless of what was before"
        pattern = part.get("pattern", {}).get("Regex", "")
        if _LOOKS_BACK.search(_CLASS.sub("", pattern.replace(r"\\", ""))):
            return "its pattern looks at what was before"
    if any(token.single_word for token in backend.get_added_tokens_decoder().values()):
        return "one of its added tokens is found as a whole word only"
    return None


def _parts(component: Any, name: str) -> Iterator[dict[str, Any]]:
    """What a normalizer or pre-tokenizer consists of, as tokenizer.json describes it."""
    found = [] if component is None else [json.loads(component.__getstate__())]
    while found:
        part = found.pop(0)
        if part["type"] != "Sequence":
            yield part
        found = part.get(name, []) + found


def _replaces_a_character(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and len(part["pattern"].get("String", "")) == 1


def _puts_spaces(pre_tokenizer: Any) -> bool:
    """Whether one is put where a text begins with none."""
    parts = _parts(pre_tokenizer, "pretokenizers")
    return any(part["type"] == "Metaspace" or part.get("add_prefix_space") for part in parts)


def _core(backend: Tokenizer) -> Tokenizer | None:
    """The same without what it adds around texts, which also moves the places of tokens. Its model is
    shared. None when added tokens would have other ids."""
    core = Tokenizer(backend.model)
    if backend.normalizer is not None:
        core.normalizer = backend.normalizer
    core.pre_tokenizer = backend.pre_tokenizer
    core.encode_special_tokens = backend.encode_special_tokens
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (core.add_special_tokens if token.special else core.add_tokens)([token])
    return core if core.get_added_tokens_decoder() == added else None


def _around(tokenizer: Any) -> tuple[array[int], array[int]] | None:
    """The tokens that it puts before and after every text."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = tokenizer("a")["input_ids"]
    for start in range(len(found) - len(alone) + 1):
        if found[start : start + len(alone)] == alone:
            return array("i", found[:start]), array("i", found[start + len(alone) :])
    return None


def _hard_text(added: list[str], seed: int, length: int) -> str:
    draw, parts = Random(seed), [*_HARD, *added[:16]]
    text = ""
    while len(text) < length:
        part = draw.choice(parts)
        text += part[draw.randrange(len(part)) :] + draw.choice(
            ("", " ", "\n", " and then ", "\n\n")
        )
    return text
