"""What a stage holds for requests, in chunks that another stage with the same layers can take over.

A chunk has the bytes of some pages, of some tails or of some host slots, one after the other, each with
its layers in order, and a hash. Whoever takes chunks over compares what pages mean on both sides first,
and the hash of each chunk; what does not arrive as it left is lost, and never used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec
import torch
import xxhash
from torch import Tensor

from headrace.runtime.decoders import decoder
from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.identity import PageIdentity
from headrace.runtime.kv.store import KVStore
from headrace.scheduler.contexts import ContextIds, Taken
from headrace.scheduler.errors import HandoverError

CHUNK_BYTES = 32 << 20
"""A chunk has no more, unless a single page does: what is on its way takes little memory."""


class Part(str, Enum):
    """What a chunk has the bytes of."""

    PAGES = "pages"
    TAILS = "tails"
    SLOTS = "slots"


@dataclass(frozen=True, slots=True)
class Cut:
    """Ids whose bytes make one chunk."""

    part: Part
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A cut that was exported: so many bytes, whose XXH3 is `digest`."""

    cut: Cut
    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """Chunks that lie one after the other in a payload, and what pages mean where they are from."""

    identity: PageIdentity
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def ids(self) -> ContextIds:
        """In the order in which they were named for the export."""
        return gathered([chunk.cut for chunk in self.chunks])

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> "Manifest":
        """HandoverError for bytes that are no manifest."""
        try:
            return decoder(cls).decode(payload)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise HandoverError(f"this is no manifest of KV pages: {error}") from error


def gathered(cuts: Sequence[Cut]) -> ContextIds:
    """The ids of all cuts, each part's in order."""
    ids: dict[Part, list[int]] = {part: [] for part in Part}
    for cut in cuts:
        ids[cut.part] += cut.ids
    return ContextIds(**{part.value: tuple(some) for part, some in ids.items()})


def by_part(ids: ContextIds) -> dict[Part, tuple[int, ...]]:
    return {part: getattr(ids, part.value) for part in Part}


class Contexts:
    """Exports and imports what a stage holds in `kv` and in the slots of `host`, which stay the caller's.

    Nothing else uses what is exported or imported meanwhile. Of a stage on CUDA, calls belong to the
    thread and the stream that computes.
    """

    def __init__(
        self,
        kv: KVStore,
        host: HostPages | None,
        identity: PageIdentity,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.identity = identity
        self._kv, self._host, self._chunk_bytes = kv, host, chunk_bytes

    def cuts(self, ids: ContextIds) -> list[Cut]:
        """`ids` in chunks. HandoverError for ids that the stage does not have."""
        self.check_ids(ids)
        cuts = []
        for part, some in by_part(ids).items():
            step = max(1, self._chunk_bytes // max(1, self._size(part)))
            cuts += [Cut(part, some[i : i + step]) for i in range(0, len(some), step)]
        return cuts

    def nbytes(self, ids: ContextIds) -> int:
        """What their export takes."""
        return sum(self._size(part) * len(some) for part, some in by_part(ids).items())

    def export(self, cut: Cut) -> tuple[Chunk, memoryview]:
        """The chunk of a cut, and its bytes, which are the caller's."""
        payload = torch.empty(self._size(cut.part) * len(cut.ids), dtype=torch.uint8)
        done = 0
        for index in cut.ids:
            for own in self._extents(cut.part, index):
                payload[done : done + own.numel()].copy_(own)
                done += own.numel()
        assert done == payload.numel(), (done, payload.numel())
        view = payload.numpy().data
        return Chunk(cut, done, xxhash.xxh3_128_digest(view)), view

    def check(self, identity: PageIdentity) -> None:
        """HandoverError unless pages from where `identity` holds mean the same here."""
        found = self.identity.differences(identity)
        if found:
            raise HandoverError(
                "KV pages can be handed over between stages with the same layers, in the same formats,"
                f" only; these have {'; '.join(found)}"
            )

    def check_ids(self, ids: ContextIds) -> None:
        """HandoverError unless the stage has all of them."""
        for part, some in by_part(ids).items():
            self._check(part, some)

    def take(self, chunk: Chunk, payload: memoryview, ids: Sequence[int] | None = None) -> bool:
        """Take a chunk's bytes over, under its own ids or under as many others.

        False if they are not what was exported: then nothing was changed. HandoverError for ids that
        the stage does not have.
        """
        part = chunk.cut.part
        targets = chunk.cut.ids if ids is None else tuple(ids)
        self._check(part, targets)
        assert len(targets) == len(chunk.cut.ids), (len(targets), len(chunk.cut.ids))
        expected = self._size(part) * len(targets)
        if not expected == chunk.nbytes == payload.nbytes:
            return False
        if xxhash.xxh3_128_digest(payload) != chunk.digest:
            return False
        if not expected:
            return True
        if payload.readonly:  # torch would warn of it
            payload = memoryview(bytearray(payload))
        source, done = torch.frombuffer(payload, dtype=torch.uint8), 0
        for index in targets:
            for own in self._extents(part, index):
                own.copy_(source[done : done + own.numel()])
                done += own.numel()
        return True

    def _size(self, part: Part) -> int:
        """Bytes of one page, tail or slot of all layers."""
        if part is Part.TAILS:
            tails = (tail for layer in self._kv.layers for tail in self._kv.tails(layer))
            return sum(tail[0].nbytes for tail in tails)
        return sum(map(self._kv.page_bytes, self._kv.layers))

    def _count(self, part: Part) -> int:
        if part is Part.SLOTS:
            return 0 if self._host is None else self._host.count
        layer = self._kv.layers[0]
        if part is Part.PAGES:
            return len(self._kv.pages(layer))
        tails = self._kv.tails(layer)
        return len(tails[0]) if tails else 0

    def _check(self, part: Part, ids: Sequence[int]) -> None:
        count = self._count(part)
        if ids and not 0 <= min(ids) <= max(ids) < count:
            raise HandoverError(
                f"{part.value} {min(ids)} to {max(ids)} are to be handed over, and this stage has {count}:"
                " both stages need the same plan"
            )

    def _extents(self, part: Part, index: int) -> Iterator[Tensor]:
        """The memory of one page, tail or slot, layer by layer: vectors of uint8."""
        if part is Part.SLOTS:
            assert self._host is not None
            yield from self._host.layers(index)
            return
        for layer in self._kv.layers:
            if part is Part.PAGES:
                yield self._kv.pages(layer)[index]
            else:
                for tail in self._kv.tails(layer):
                    yield tail[index].view(-1).view(torch.uint8)


def take_chunk(
    contexts: Contexts, identity: PageIdentity, chunk: Chunk, payload: memoryview
) -> Taken:
    """Take over one chunk, under its own ids, from where pages mean what `identity` says.

    HandoverError for pages that mean something else here, or of which this stage has none.
    """
    contexts.check(identity)
    if contexts.take(chunk, payload):
        return Taken(chunk.nbytes)
    return Taken(lost=gathered([chunk.cut]))
