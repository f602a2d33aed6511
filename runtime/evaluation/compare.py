"""Answers that a model gave, as it and a reference would have given them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.runtime.evaluation.answers import Answer, AnswerFigures
from headrace.runtime.evaluation.figures import divergence_figures, perplexity
from headrace.runtime.evaluation.measure import Predictions, Progress, measure
from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.sweep.sweep import Sweep


def answer_windows(answers: Sequence[Answer], context: int) -> Windows:
    """A window of `context` tokens for each answer, of which what was answered is predicted."""
    lengths = tuple(len(answer.tokens) for answer in answers)
    tokens = torch.zeros(len(answers), context, dtype=torch.int64)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer.tokens)] = torch.tensor(answer.tokens)
    return Windows(tokens, lengths, 0, tuple(answer.prompt for answer in answers))


def compare_answers(
    reference: Sweep,
    served: Sweep,
    answers: Sequence[Answer],
    context: int,
    tie: float,
    progress: Progress,
) -> AnswerFigures:
    """`tie`, in nats: of two tokens whose log-probabilities are no farther apart either may be the likeliest, for
    roundings differ between a pass and a sweep."""
    windows = answer_windows(answers, context)
    beside, found = measure([reference, served], windows, progress)
    divergence = divergence_figures(windows, beside, found)
    greedy = windows.counted & torch.tensor([answer.greedy for answer in answers])[:, None]
    return AnswerFigures(
        sequences=len(answers),
        tokens=windows.count,
        kld_mean=divergence.mean,
        kld_p99=divergence.p99,
        top1=divergence.top1,
        perplexity=perplexity(windows, found),
        reference_perplexity=perplexity(windows, beside),
        greedy_tokens=int(greedy.sum()),
        strayed=_strayed(found, greedy, tie),
        strayed_from_reference=_strayed(beside, greedy, tie),
    )


def _strayed(found: Predictions, chosen: Tensor, tie: float) -> int:
    """Of the chosen tokens, those that are less likely than the likeliest by more than `tie` nats."""
    return int(((found.nll - found.top_nll)[chosen] > tie).sum())
