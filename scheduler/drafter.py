"""How one request is drafted: guesses of its next tokens, and what became of them."""

from collections.abc import Sequence
from typing import Protocol

from headrace.scheduler.ngrams import NgramIndex

LEAST_RATE = 0.2
"""Where fewer of the drafts are right, none are made; guesses go on to be compared with what is drawn."""

_WEIGHT = 0.15
"""Of the newest outcome in averages: five in a row say more than all before."""

_FEWEST, _SURE = 4, 0.8
"""Drafts at a rate of LEAST_RATE, and the rate at which there are as many as there may be."""


class Guesses(Protocol):
    """What a request is drafted by."""

    @property
    def num_wanted(self) -> int:
        """Drafts that the guess is worth; 0 where too few of late were right."""

    @property
    def gain(self) -> float:
        """Tokens more in a pass, to be expected."""

    def learn(self, tokens: Sequence[int], most: int) -> int:
        """Compare the last guess with what has come, and make another one.

        Of long prompts `most` tokens are taken in now; returns how many were.
        """

    def drafts(self, count: int) -> list[int]:
        """The first `count` tokens of the guess, made of all tokens that there are."""


class Drafter:
    """Guesses what a request's tokens go on with, and keeps score.

    `rate` is the recent share of right ones among guessed tokens, each counted if those before it were
    right, and `hits` that of passes for which there was a guess.
    """

    __slots__ = ("_at", "_guess", "_index", "_most", "hits", "rate")

    def __init__(self, most: int) -> None:
        self._index, self._most = NgramIndex(), most
        self._guess: list[int] = []
        self._at = 0  # tokens there were when it was made
        # One guess is made on credit.
        self.rate, self.hits = LEAST_RATE, 0.0

    def learn(self, tokens: Sequence[int], most: int) -> int:
        if len(tokens) == self._at:
            return 0
        self._judge(tokens)
        taken = self._index.extend(tokens, most)
        self._at = len(tokens)
        if self._index.num_tokens == len(tokens):
            self._guess = self._index.continuation(tokens, self._most)
            self.hits += _WEIGHT * (bool(self._guess) - self.hits)
        return taken

    def _judge(self, tokens: Sequence[int]) -> None:
        for guessed, token in zip(self._guess, tokens[self._at :], strict=False):
            self.rate += _WEIGHT * ((guessed == token) - self.rate)
            if guessed != token:
                break
        self._guess = []

    @property
    def num_wanted(self) -> int:
        if self.rate < LEAST_RATE or not self._guess:
            return 0
        fewest = min(_FEWEST, self._most)
        share = min(1.0, (self.rate - LEAST_RATE) / (_SURE - LEAST_RATE))
        return fewest + int(share * (self._most - fewest))

    @property
    def gain(self) -> float:
        if self.rate < LEAST_RATE:
            return 0.0
        right = min(self.rate, 0.99)
        return self.hits * right * (1.0 - right**self._most) / (1.0 - right)

    def drafts(self, count: int) -> list[int]:
        return self._guess[:count]
