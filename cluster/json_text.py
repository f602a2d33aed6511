"""JSON of strangers: bounded in what it makes of a few bytes, before anything is made of it."""

import json
from itertools import accumulate
from typing import Any

MAX_DEPTH = 128
"""Of lists and objects in each other: what walks through them afterwards calls itself for each."""

MAX_CONTAINERS = 100_000
"""Lists and objects: two bytes become an object of Python's, and nobody else runs while they are made."""

_OPEN, _CLOSE = b"[{", b"]}"
_OTHERS = bytes(set(range(256)) - set(_OPEN + _CLOSE))
_STEPS = bytes.maketrans(_OPEN + _CLOSE, b"\2\2\0\0")


def read_json(text: bytes | str) -> Any:
    """Its value. ValueError for what is no JSON, is no UTF-8 (lone surrogates are let through), or is too deep or
    too rich."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _check_shape(raw)
    return json.loads(raw.decode("utf-8-sig", "surrogatepass"))


def _check_shape(raw: bytes) -> None:
    if sum(map(raw.count, (b"[", b"{"))) <= MAX_DEPTH:
        return
    # Every other piece between quotes is outside of strings; where that is wrong, it is no JSON, and
    # reading ends there.
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(None, _OTHERS)
    if sum(map(brackets.count, (b"[", b"{"))) > MAX_CONTAINERS:
        raise ValueError(f"it has more than {MAX_CONTAINERS} lists and objects")
    if max(accumulate(step - 1 for step in brackets.translate(_STEPS)), default=0) > MAX_DEPTH:
        raise ValueError(f"lists and objects are more than {MAX_DEPTH} deep in each other")
