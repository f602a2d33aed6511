"""Chunks in a cold tier: which are there, and their bytes, verified."""

import hashlib
import threading
from dataclasses import dataclass

from headrace.runtime.cold.codec import DamagedObjectError, Data, decode
from headrace.runtime.cold.record import ChunkRef, ModelRecord
from headrace.runtime.cold.source import ColdModel
from headrace.runtime.cold.tier import MODELS, OBJECTS, ColdTier
from headrace.scheduler.errors import ColdTierError


def object_path(name: str) -> str:
    return f"{OBJECTS}/{name[:2]}/{name}"


def record_path(name: str) -> str:
    return f"{MODELS}/{name}.json"


def find_record(tier: ColdTier, name: str) -> ModelRecord | None:
    data = tier.read(record_path(name))
    return None if data is None else ModelRecord.decode(data, f"{record_path(name)} in {tier.url}")


def read_record(tier: ColdTier, model: ColdModel) -> ModelRecord:
    """ColdTierError, with the names that there are, if there is no such model."""
    record = find_record(tier, model.name)
    if record is None:
        names = ", ".join(model_names(tier)) or "none"
        raise ColdTierError(
            f"there is no model {model.name} in {tier.url}; there are: {names}. Name one as URL#NAME"
        )
    return record


def model_names(tier: ColdTier) -> list[str]:
    names = (entry.name for entry in tier.entries(MODELS))
    return sorted(name[:-5] for name in names if name.endswith(".json") and name[0] != ".")


@dataclass(frozen=True, slots=True)
class ChunkReader:
    """Reads the chunks of a model. `where` is what messages call that: URL#NAME."""

    tier: ColdTier
    where: str

    def read(self, chunk: ChunkRef, file: str) -> Data:
        """The chunk's bytes, whose hash is the chunk's. ColdTierError, naming the object, for others.

        Read twice before that is said: bytes may have changed on their way here.
        """
        try:
            return self._read(chunk, file)
        except DamagedObjectError:
            pass
        try:
            return self._read(chunk, file)
        except DamagedObjectError as error:
            raise ColdTierError(
                f"object {object_path(chunk.object)} in {self.tier.url}, a part of {file} of {self.where},"
                f" is damaged: {error}. {self._cure}"
            ) from error

    def is_good(self, chunk: ChunkRef, file: str) -> bool:
        """ColdTierError where the chunk's base is not: then that has to be made good first."""
        base = self._base(chunk, file)
        stored = self.tier.read(object_path(chunk.object))
        try:
            return stored is not None and _is(decode(stored, chunk.nbytes, base), chunk)
        except DamagedObjectError:
            return False

    def _read(self, chunk: ChunkRef, file: str) -> Data:
        base = self._base(chunk, file)
        stored = self.tier.read(object_path(chunk.object))
        if stored is None:
            raise ColdTierError(
                f"object {object_path(chunk.object)}, a part of {file} of {self.where}, is missing in "
                f"{self.tier.url}. {self._cure}"
            )
        data = decode(stored, chunk.nbytes, base)
        if not _is(data, chunk):
            raise DamagedObjectError("its bytes have another hash than its name")
        return data

    def _base(self, chunk: ChunkRef, file: str) -> Data | None:
        if chunk.base is None:
            return None
        return self.read(ChunkRef(chunk.base, chunk.nbytes), f"the base of {file}")

    @property
    def _cure(self) -> str:
        return (
            "Push a store that has it once more, from where it is whole: headrace push STORE "
            f"{self.tier.url}#NAME --repair"
        )


def hash_of(data: Data) -> str:
    return hashlib.sha256(data).hexdigest()


def _is(data: Data, chunk: ChunkRef) -> bool:
    return hash_of(data) == chunk.hash


class ObjectIndex:
    """Which objects a tier has, listed as far as anybody asks. Any thread may."""

    def __init__(self, tier: ColdTier) -> None:
        self._tier = tier
        # By folder and chunk: the bases of its objects, "" for the one that needs none.
        self._folders: dict[str, dict[str, tuple[str, ...]]] = {}
        self._lock = threading.Lock()

    def find(self, digest: str, nbytes: int) -> ChunkRef | None:
        """How to refer to the chunk of that hash, if it is there."""
        bases = self._bases(digest)
        if "" in bases:
            return ChunkRef(digest, nbytes)
        usable = (base for base in bases if "" in self._bases(base))
        base = next(usable, None)
        return None if base is None else ChunkRef(digest, nbytes, base)

    def add(self, chunk: ChunkRef) -> None:
        folder = self._folder(chunk.hash[:2])
        with self._lock:
            folder[chunk.hash] = (*folder.get(chunk.hash, ()), chunk.base or "")

    def _bases(self, digest: str) -> tuple[str, ...]:
        return self._folder(digest[:2]).get(digest, ())

    def _folder(self, name: str) -> dict[str, tuple[str, ...]]:
        with self._lock:
            found = self._folders.get(name)
        if found is None:
            listed: dict[str, tuple[str, ...]] = {}
            for entry in self._tier.entries(f"{OBJECTS}/{name}"):
                chunk, _, base = entry.name.partition(".")
                if chunk:
                    listed[chunk] = (*listed.get(chunk, ()), base)
            with self._lock:
                found = self._folders.setdefault(name, listed)
        return found
