"""Guesses without sense, as many as there may be: what drafts cost a pass of random weights, whose tokens
nobody could guess."""

from collections.abc import Sequence


class BlindDrafter:
    """Guesses that a text says its last tokens again, and goes on whatever becomes of it."""

    def __init__(self, most: int) -> None:
        self.num_wanted, self.gain = most, float(most)
        self._guess: list[int] = []

    def learn(self, tokens: Sequence[int], most: int) -> int:
        self._guess = list(tokens[-self.num_wanted :])
        return 0

    def drafts(self, count: int) -> list[int]:
        return self._guess[:count]
