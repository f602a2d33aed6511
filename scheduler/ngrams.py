"""What may come next in a text that repeats itself: what came after its last few tokens before.

Prompt lookup: summaries, answers about a text and edits of code repeat much of what they were given.
"""

from array import array
from collections.abc import Sequence

SHORTEST, LONGEST = 2, 8
"""Tokens at the end that must have occurred before, and more of which say nothing more."""

CANDIDATES = 8
"""Earlier places that are looked at, newest first: pairs of tokens may be very common."""

REMEMBERED = 1 << 16
"""Newest tokens that are found again: 8 bytes for each of them."""


class NgramIndex:
    """The places of each pair of neighbouring tokens in a list that only grows.

    Chains by hash: `_heads` has the newest place of each, `_links` the one before each place. A token is
    taken in once, in constant time (with the doubling of both, on average).
    """

    def __init__(self) -> None:
        self._heads = array("i", [-1]) * 256
        self._links = array("i", [-1]) * 256
        self.num_tokens = 0  # taken in

    def extend(self, tokens: Sequence[int], most: int) -> int:
        """Take in up to `most` more of `tokens`, which begin with those before; how many they were."""
        start, end = self.num_tokens, min(len(tokens), self.num_tokens + most)
        if end > len(self._heads) and len(self._heads) < REMEMBERED:
            size = min(REMEMBERED, 1 << (end - 1).bit_length())
            self._heads, self._links = array("i", [-1]) * size, array("i", [-1]) * size
            self._link(tokens, max(0, end - size), end)
        else:
            self._link(tokens, start, end)
        self.num_tokens = end
        return end - start

    def _link(self, tokens: Sequence[int], start: int, end: int) -> None:
        heads, links, mask = self._heads, self._links, len(self._heads) - 1
        before = tokens[start - 1] if start else -1
        for place in range(start, end):
            token = tokens[place]
            head = _hash(before, token) & mask
            links[place & mask] = heads[head]
            heads[head] = place
            before = token

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that followed the longest end of `tokens` that occurred before; else none.

        All of `tokens` have been taken in. What goes on to their end is taken to repeat itself.
        """
        place = self._find(tokens)
        if place < 0:
            return []
        found = list(tokens[place + 1 : place + 1 + count])
        period = len(tokens) - 1 - place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _find(self, tokens: Sequence[int]) -> int:
        """Where the longest of the ends that are found ended before, the newest of them; -1 if none."""
        end, mask = len(tokens) - 1, len(self._heads) - 1
        assert self.num_tokens == len(tokens)
        best, longest, oldest = -1, SHORTEST - 1, max(0, end - mask)
        place = self._links[end & mask] if end > 0 else -1
        for _ in range(CANDIDATES):
            if place <= oldest:
                break
            length = _common(tokens, place, end)
            if length > longest:
                best, longest = place, length
                if length == LONGEST:
                    break
            place = self._links[place & mask]
        return best


def _hash(before: int, token: int) -> int:
    return (before * 2654435761 + token * 2246822519) >> 7


def _common(tokens: Sequence[int], place: int, end: int) -> int:
    """How many tokens up to `place` are those up to `end`, LONGEST at most."""
    length = 0
    most = min(LONGEST, place + 1)
    while length < most and tokens[place - length] == tokens[end - length]:
        length += 1
    return length
