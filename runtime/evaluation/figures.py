"""What predictions come to: figures of a model beside its reference."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.runtime.evaluation.measure import Predictions
from headrace.runtime.evaluation.windows import Windows

DECADES = range(-8, 2)
"""Of the histogram: bins of a half decade from 1e-8 to 1e1 nats, the first and the last open."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || model) over predicted tokens, in nats; `top1` is the share with the same likeliest token.

    `histogram`: (upper edge, tokens) of each bin, of which the last one's edge is infinite.
    """

    mean: float
    median: float
    p99: float
    max: float
    top1: float
    histogram: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Octave:
    """Tokens at positions [first, last] of their windows; `kld` is the mean."""

    first: int
    last: int
    tokens: int
    perplexity: float
    reference_perplexity: float
    kld: float


@dataclass(frozen=True, slots=True)
class WorstWindow:
    """Window `index`, its mean divergence, and position [first, last) of a stretch round its worst token."""

    index: int
    kld: float
    first: int
    last: int


def perplexity(windows: Windows, found: Predictions) -> float:
    """exp of the mean -log p of the predicted tokens."""
    return _perplexity(found.nll[windows.counted])


def _perplexity(nll: Tensor) -> float:
    mean = nll.double().mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def divergence_figures(windows: Windows, reference: Predictions, found: Predictions) -> Divergence:
    kld = found.kld[windows.counted].double().numpy()
    same = (found.top == reference.top)[windows.counted]
    edges = [10 ** (half / 2) for half in range(2 * DECADES.start, 2 * DECADES.stop - 1)]
    bins = np.bincount(np.digitize(kld, edges), minlength=len(edges) + 1)
    return Divergence(
        mean=float(kld.mean()),
        median=float(np.median(kld)),
        p99=float(np.percentile(kld, 99)),
        max=float(kld.max()),
        top1=float(same.double().mean()),
        histogram=tuple(zip([*edges, math.inf], map(int, bins), strict=True)),
    )


def octaves(windows: Windows, reference: Predictions, found: Predictions) -> Iterator[Octave]:
    """By the predicted token's position: 1, 2-3, 4-7, and so on."""
    position = torch.arange(1, windows.context)
    first = 1
    while first < windows.context:
        chosen = windows.counted & ((position >= first) & (position < 2 * first))[None]
        if chosen.any():
            yield Octave(
                first=first,
                last=min(2 * first, windows.context) - 1,
                tokens=int(chosen.sum()),
                perplexity=_perplexity(found.nll[chosen]),
                reference_perplexity=_perplexity(reference.nll[chosen]),
                kld=found.kld[chosen].double().mean().item(),
            )
        first *= 2


def worst_windows(
    windows: Windows, found: Predictions, count: int, stretch: int
) -> list[WorstWindow]:
    """The `count` windows of the largest mean divergence, the worst first; of each, `stretch` tokens."""
    counted = windows.counted
    kld = found.kld.double().masked_fill(~counted, 0)
    means = kld.sum(1) / counted.sum(1).clamp(min=1)
    worst = []
    for index in means.argsort(descending=True)[:count].tolist():
        peak = int(kld[index].argmax()) + 1
        last = min(windows.lengths[index], peak + stretch // 2)
        first = max(windows.prefix, last - stretch, 0)
        last = min(windows.lengths[index], first + stretch)
        worst.append(WorstWindow(index, means[index].item(), first, last))
    return worst
