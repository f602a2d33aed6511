"""What the stages' logs on NVMe hold, as far as is known here."""

from collections.abc import Collection, Iterable


class NvmeIndex:
    """At most `capacity` keys; the oldest are forgotten first, as an append-only log drops them.

    It may name a page that a stage has not, which a move then reports as lost.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[bytes]) -> list[bytes]:
        """Note keys in the order in which they were written; returns what is forgotten for them."""
        if not self.capacity:
            return []
        for key in keys:
            self._keys.pop(key, None)
            self._keys[key] = None
        forgotten = []
        while len(self._keys) > self.capacity:
            key = next(iter(self._keys))
            del self._keys[key]
            forgotten.append(key)
        return forgotten

    def retain(self, keys: Collection[bytes]) -> list[bytes]:
        """Forget all but `keys`; returns what is forgotten."""
        forgotten = [key for key in self._keys if key not in keys]
        for key in forgotten:
            del self._keys[key]
        return forgotten

    def discard(self, key: bytes) -> None:
        self._keys.pop(key, None)
