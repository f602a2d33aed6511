"""What a cold tier knows of one model: its files, and of which chunks each is made."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from headrace.runtime.cold.chunks import MOST_BYTES
from headrace.scheduler.errors import ColdTierError

VERSION = 1

Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0)]
# A plain name: what a record says is written to disk.
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][^/\\\x00]*$", max_length=255)]


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk's SHA-256 and size; `base` is the hash of the chunk that its object is a difference from.

    A base is an object of its own kind, never a difference itself.
    """

    hash: Hash
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]
    base: Hash | None = None

    @property
    def object(self) -> str:
        """Its object's name."""
        return self.hash if self.base is None else f"{self.hash}.{self.base}"

    @property
    def objects(self) -> tuple[str, ...]:
        """All objects that it takes to make the chunk."""
        return (self.object,) if self.base is None else (self.object, self.base)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """`block` is the name of the store's block that the file holds; None for config, tokenizer, ..."""

    name: FileName
    nbytes: Size
    block: str | None
    chunks: tuple[ChunkRef, ...]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """`digest` is the store's, `base` the model that it was stored against, `created` seconds since
    the epoch."""

    name: str
    digest: str
    created: float
    base: str | None
    files: tuple[FileRecord, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def chunks(self) -> Iterator[ChunkRef]:
        return (chunk for file in self.files for chunk in file.chunks)

    @property
    def objects(self) -> set[str]:
        return {name for chunk in self.chunks for name in chunk.objects}

    def encode(self) -> bytes:
        """JSON, with a hash of itself: a damaged record would make whole objects look damaged."""
        body = msgspec.json.encode(self)
        whole = {"version": VERSION, "sha256": hashlib.sha256(body).hexdigest()}
        return json.dumps(whole)[:-1].encode() + b', "model": ' + body + b"}\n"

    @staticmethod
    def decode(data: bytes, where: str) -> "ModelRecord":
        """ColdTierError, naming `where`, for what is no record or a damaged one."""
        try:
            whole = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            version = msgspec.json.decode(whole["version"])
            if version != VERSION:
                raise ColdTierError(
                    f"{where} is of version {version}, this release reads {VERSION}: update headrace"
                )
            body, expected = bytes(whole["model"]), msgspec.json.decode(whole["sha256"], type=str)
            if hashlib.sha256(body).hexdigest() != expected:
                raise ValueError("its hash is another one")
            record: ModelRecord = _decode_body(body)
        except (ValueError, KeyError, TypeError) as error:
            raise ColdTierError(
                f"{where} is damaged ({error}): push the store again from where it is whole"
            ) from error
        for file in record.files:
            if sum(chunk.nbytes for chunk in file.chunks) != file.nbytes:
                raise ColdTierError(f"{where} is damaged: chunks of {file.name} do not make it")
        return record


def _decode_body(body: bytes) -> Any:
    return msgspec.json.decode(body, type=ModelRecord)
