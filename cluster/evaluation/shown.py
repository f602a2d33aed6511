"""Tokens as people read them: the worst windows and continuations, side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.cluster.evaluation.results import (
    Generation,
    ShownContinuation,
    ShownToken,
    ShownWindow,
)
from headrace.runtime.evaluation.figures import WorstWindow
from headrace.runtime.evaluation.measure import Predictions
from headrace.runtime.evaluation.windows import Windows

SHOWN = 4
"""Windows, and continuations."""

STRETCH = 64
"""Tokens of a window."""


class Reader:
    """Text of tokens by a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, tokens: Sequence[int]) -> str:
        found: str = self._tokenizer.decode(tokens)
        return found

    def after(self, tokens: Sequence[int], token: int) -> str:
        """What a token adds to the text of those before it, such as a space before a word."""
        return self.text([*tokens, token])[len(self.text(tokens)) :]

    def window(
        self, worst: WorstWindow, windows: Windows, reference: Predictions, found: Predictions
    ) -> ShownWindow:
        ids = windows.tokens[worst.index].tolist()
        shown = []
        for place in range(worst.first, worst.last):
            before = ids[max(0, place - 8) : place]  # enough to tell how the text goes on
            at = worst.index, place - 1
            tops = (int(reference.top[at]), int(found.top[at])) if place else (0, 0)
            parts = tops[0] != tops[1] and bool(windows.counted[at])
            shown.append(
                ShownToken(
                    text=self.after(before, ids[place]),
                    kld=float(found.kld[at]) if place else 0.0,
                    reference=self.after(before, tops[0]) if parts else None,
                    store=self.after(before, tops[1]) if parts else None,
                )
            )
        return ShownWindow(worst.index, worst.kld, worst.first, shown)

    def generation(self, prompts: Tensor, reference: Tensor, found: Tensor) -> Generation:
        """prompts [N, P] and both models' continuations [N, M]."""
        same = reference == found
        common = same.int().cumprod(1).sum(1)
        parting = common.argsort(stable=True)[:SHOWN]
        return Generation(
            prompts=len(prompts),
            tokens=reference.shape[1],
            equal=same.double().mean().item(),
            common_prefix=common.double().mean().item(),
            shown=[
                ShownContinuation(
                    prompt=self.text(prompts[i].tolist()),
                    reference=self.text(reference[i].tolist()),
                    store=self.text(found[i].tolist()),
                    common=int(common[i]),
                )
                for i in parting.tolist()
            ],
        )


def choose_prompts(windows: Windows, count: int, new_tokens: int) -> tuple[Tensor, Tensor] | None:
    """Beginnings of up to `count` windows, evenly spread, [N, P], and how the text goes on [N, new_tokens].

    None where no window is long enough for a prompt of one token.
    """
    prompt = min(64, windows.context - new_tokens)
    if prompt < 1:
        return None
    long = [i for i, n in enumerate(windows.lengths) if n >= prompt + new_tokens]
    if not long or prompt < windows.prefix:
        return None
    step = max(1, len(long) // count)
    chosen = windows.tokens[torch.tensor(long[::step][:count])]
    return chosen[:, :prompt], chosen[:, prompt : prompt + new_tokens]
