"""A compact set of ids, for inputs with millions of rows."""

from array import array

from headrace.cluster.rows import digest64

_FIRST_SLOTS = 1 << 10


class IdSet:
    """Remembers 64-bit hashes: 16 to 32 bytes an id, against some 120 of a set of strings.

    Two different ids share a hash with a probability of n^2 / 2^65: 3e-8 for a million rows.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))  # 0 is free
        self._count = 0

    def add(self, row_id: str | int) -> bool:
        """True if the id is new. 7 and "7" are the same id."""
        value = digest64(str(row_id).encode("utf-8", "surrogatepass")) or 1
        if not self._insert(value):
            return False
        self._count += 1
        if 2 * self._count > len(self._slots):
            self._grow()
        return True

    def _insert(self, value: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        place = value & mask
        while slots[place]:
            if slots[place] == value:
                return False
            place = (place + 1) & mask
        slots[place] = value
        return True

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._insert(value)
