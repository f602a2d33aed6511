"""What an evaluation found; as JSON these are objects of the same names."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.runtime.evaluation.figures import Divergence, Octave

VERSION = 1


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token of a text. Where the likeliest tokens differ, what each model holds for likeliest instead."""

    text: str
    kld: float
    reference: str | None = None
    store: str | None = None


@dataclass(frozen=True, slots=True)
class ShownWindow:
    """A stretch of a window, from position `first` of it; `kld` is the whole window's mean."""

    index: int
    kld: float
    first: int
    tokens: list[ShownToken]


@dataclass(frozen=True, slots=True)
class ShownContinuation:
    """What both models made of a prompt, greedily, and how many of the first tokens are equal."""

    prompt: str
    reference: str
    store: str
    common: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Greedy continuations of `prompts` prompts, `tokens` tokens each.

    `equal`: the share of places with equal tokens. `common_prefix`: tokens until the first difference, on
    average. `shown`: those that part first.
    """

    prompts: int
    tokens: int
    equal: float
    common_prefix: float
    shown: list[ShownContinuation]


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model. `bits_a_weight` counts all of the layers' bytes over the weights of their matrices.

    `seconds_a_token` is what this run took of wall-clock time for a token of the texts, waiting for weights
    included: not what generating a token takes.
    """

    path: str
    format: str
    nbytes: int
    bits_a_weight: float
    perplexity: float
    seconds_a_token: float


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """A store, and beside its reference how far it is from that; None without one."""

    model: ModelFigures
    perplexity_ratio: float | None = None
    divergence: Divergence | None = None
    octaves: list[Octave] | None = None
    layer_errors: list[float] | None = None
    generation: Generation | None = None
    worst: list[ShownWindow] | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`predicted` tokens of the texts, in `windows` windows of at most `context` tokens."""

    version: int
    texts: list[str]
    context: int
    windows: int
    predicted: int
    device: str
    dtype: str
    micro_batch_tokens: int
    reference: ModelFigures | None
    stores: list[StoreFigures]

    @property
    def models(self) -> list[ModelFigures]:
        """The reference, if there is one, and the stores."""
        first = [] if self.reference is None else [self.reference]
        return [*first, *(store.model for store in self.stores)]

    @property
    def size(self) -> str:
        """How much text in what windows."""
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        texts = ", ".join(Path(text).name for text in self.texts)
        return (
            f"{self.predicted:,} predicted tokens of {texts} in {windows} of up to {self.context}"
        )

    def as_json(self) -> dict[str, Any]:
        """Infinite numbers (the last edge of a histogram) are None."""
        found: dict[str, Any] = _finite(asdict(self))
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
