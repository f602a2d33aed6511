"""How much of a disk files may take. Whoever wants to write asks first."""

import threading


class Space:
    """Bytes that are taken of `limit`. Any thread may ask."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        return self._used

    def take(self, size: int) -> bool:
        """Have `size` bytes more, or none of them."""
        with self._lock:
            if self._used + size > self.limit:
                return False
            self._used += size
            return True

    def count(self, size: int) -> None:
        """Take what is on the disk already, whether there is room or not."""
        with self._lock:
            self._used += size

    def give(self, size: int) -> None:
        with self._lock:
            self._used -= size
            assert self._used >= 0, self._used


class BatchSpace:
    """What one batch takes of the space while it is unfinished.

    Its reserve is taken when its lines have been counted: enough for each of them to end in a short
    error, so that a batch comes to its end on a full disk, too. What is longer is taken as it comes.
    """

    def __init__(self, space: Space) -> None:
        self._space, self._held = space, 0
        self.is_full = False

    def reserve(self, size: int) -> bool:
        """Have `size` bytes more, or none of them."""
        if not self._space.take(size):
            return False
        self._held += size
        return True

    def take(self, size: int) -> bool:
        """Have `size` bytes beyond the reserve; once that fails, the batch counts as full."""
        self.is_full = not self.reserve(size)
        return not self.is_full

    def count(self, size: int) -> None:
        """Take what an earlier run took."""
        self._space.count(size)
        self._held += size

    def give_all(self) -> None:
        self._space.give(self._held)
        self._held = 0
