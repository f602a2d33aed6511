"""Decoders of msgpack, each made by one thread alone.

msgspec 0.22 looks at a dataclass when it is to be decoded for the first time, and the process crashes
where a second thread does so meanwhile.
"""

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_making = threading.Lock()
_made: dict[object, msgspec.msgpack.Decoder[Any]] = {}


def decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]:
    """For values of `kind`; any thread may call it, and what it returns."""
    with _making:
        if kind not in _made:
            _made[kind] = msgspec.msgpack.Decoder(kind)
        return _made[kind]
