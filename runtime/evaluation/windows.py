"""Texts as windows of tokens, and which of them are predicted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """tokens [W, L] int64, those of window w from lengths[w] on are padding (0).

    The first `prefix` tokens of each (such as a BOS), or `prompts[w]` where that is given, are not predicted, and
    neither is a window's first token, which follows nothing.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    prefix: int
    prompts: tuple[int, ...] | None = None

    @cached_property
    def counted(self) -> Tensor:
        """[W, L - 1], true at i where token i + 1 is predicted from those before it."""
        target = torch.arange(1, self.tokens.shape[1])
        ends = torch.tensor(self.lengths)[:, None]
        prompts = self.prompts or (self.prefix,) * len(self.lengths)
        return (target[None] >= torch.tensor(prompts)[:, None]) & (target[None] < ends)

    @property
    def count(self) -> int:
        """Tokens that are predicted."""
        return int(self.counted.sum())

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    @property
    def computed(self) -> int:
        """Tokens that a model runs over, padding left out."""
        return sum(self.lengths)


def cut_windows(
    texts: Iterable[Sequence[int]], prefix: Sequence[int], context: int
) -> Windows | None:
    """Each text in windows of `context` tokens, which begin with `prefix`; None without two tokens in a row."""
    step = context - len(prefix)
    assert step > 0
    fewest = 1 if prefix else 2
    windows = [
        [*prefix, *text[first : first + step]]
        for text in texts
        for first in range(0, len(text), step)
        if len(text) - first >= fewest
    ]
    if not windows:
        return None
    lengths = tuple(map(len, windows))
    tokens = torch.zeros(len(windows), max(lengths), dtype=torch.int64)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window)] = torch.tensor(window)
    return Windows(tokens, lengths, len(prefix))
