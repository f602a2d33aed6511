"""Answers that a model gave, and what comparing it with a reference over them comes to. Light to import."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt of `prompt` tokens and what was answered, in one list. `greedy`: each was to be the likeliest."""

    tokens: tuple[int, ...]
    prompt: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Over the tokens of answers alone. `kld` is KL(reference || served) in nats, `top1` the share of tokens for
    which both models have the same likeliest one.

    Of the `greedy_tokens` that were emitted, `strayed` are those that the served model itself gives less than its likeliest,
    and `strayed_from_reference` those that the reference does, by more than was taken for a tie.
    """

    sequences: int
    tokens: int
    kld_mean: float
    kld_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float
    greedy_tokens: int
    strayed: int
    strayed_from_reference: int
