"""Stage messages as msgpack: the frozen dataclasses of headrace.scheduler, no pickle of ours."""

from typing import TypeVar

import msgspec

from headrace.runtime.decoders import decoder

T = TypeVar("T")


def encode(message: object) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(payload: bytes, kind: type[T]) -> T:
    """The message in `payload`; a ValidationError when its shape is not that of `kind`."""
    return decoder(kind).decode(payload)
