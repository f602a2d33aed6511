"""What is in a cold tier, and the removal of what nobody needs.

An object goes only while no push is under way (lease.py), so that none is found by a push and then gone.
Objects that belong to no model are of pushes that were killed: they stay for a while, to be gone on with.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from headrace.runtime.cold.lease import LEASES, REMOVAL, Lease
from headrace.runtime.cold.objects import (
    find_record,
    model_names,
    read_record,
    record_path,
)
from headrace.runtime.cold.record import ModelRecord
from headrace.runtime.cold.source import ColdModel
from headrace.runtime.cold.tier import MODELS, OBJECTS, PARTIAL, ColdTier, Found

FOLDERS = [f"{i:02x}" for i in range(256)]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model's bytes as a store, and those of its objects: `own` that no other model needs, `shared`,
    and how many are `missing`."""

    record: ModelRecord
    own: int
    shared: int
    missing: int


@dataclass(frozen=True, slots=True)
class TierListing:
    """All models, the bytes of all objects, and those of objects that belong to no model."""

    models: tuple[ModelEntry, ...]
    stored: int
    orphans: int
    orphan_bytes: int


@dataclass(frozen=True, slots=True)
class Removed:
    objects: int
    nbytes: int


def list_tier(url: str) -> TierListing:
    """Reads every record, and lists every object."""
    tier = ColdTier(url)
    records = _records(tier)
    sizes = {entry.name: entry.nbytes for _, entry in _objects(tier)}
    users = Counter(name for record in records for name in record.objects)
    entries = []
    for record in records:
        there = {name: sizes[name] for name in record.objects if name in sizes}
        own = sum(size for name, size in there.items() if users[name] == 1)
        missing = len(record.objects) - len(there)
        entries.append(ModelEntry(record, own, sum(there.values()) - own, missing))
    orphans = [size for name, size in sizes.items() if name not in users]
    return TierListing(tuple(entries), sum(sizes.values()), len(orphans), sum(orphans))


def remove(model: ColdModel) -> Removed:
    """Removes a model, and its objects that no other one needs.

    ColdTierError when there is no such model, or somebody is pushing to the tier or removing from it.
    """
    tier = ColdTier(model.url)
    with Lease(tier, REMOVAL) as lease:
        record = read_record(tier, model)
        others = [each for each in _records(tier) if each.name != model.name]
        needed = {name for each in others for name in each.objects}
        tier.remove(record_path(model.name))
        count = nbytes = 0
        for path, entry in _objects(tier, {name[:2] for name in record.objects}):
            if entry.name in record.objects and entry.name not in needed:
                lease.refresh()
                tier.remove(path)
                count, nbytes = count + 1, nbytes + entry.nbytes
    return Removed(count, nbytes)


def clean(url: str, older_than: float) -> Removed:
    """Removes what belongs to no model and is older than so many seconds.

    ColdTierError when somebody is pushing to the tier or removing from it.
    """
    tier = ColdTier(url)
    count = nbytes = 0
    with Lease(tier, REMOVAL) as lease:
        needed = {name for record in _records(tier) for name in record.objects}
        for path, entry in chain(_objects(tier), _partials(tier)):
            lease.refresh()
            if entry.name not in needed and tier.age(path) > older_than:
                tier.remove(path)
                count, nbytes = count + 1, nbytes + entry.nbytes
    return Removed(count, nbytes)


def _records(tier: ColdTier) -> list[ModelRecord]:
    """ColdTierError for one that cannot be read: what it needs is not known then."""
    found = [find_record(tier, name) for name in model_names(tier)]
    return [record for record in found if record is not None]


def _objects(tier: ColdTier, folders: set[str] | None = None) -> Iterator[tuple[str, Found]]:
    """Paths and entries; those that are being written, or were when somebody was killed, are among them."""
    for folder in sorted(folders or FOLDERS):
        for entry in tier.entries(f"{OBJECTS}/{folder}"):
            yield f"{OBJECTS}/{folder}/{entry.name}", entry


def _partials(tier: ColdTier) -> Iterator[tuple[str, Found]]:
    """What was never finished, apart from objects."""
    for folder in (MODELS, LEASES):
        for entry in tier.entries(folder):
            if entry.name.startswith(PARTIAL):
                yield f"{folder}/{entry.name}", entry
