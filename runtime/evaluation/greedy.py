"""Greedy continuations by sweeps, which verify guesses of all tokens at once.

A sweep over prompts and guessed continuations gives what a model would say after each token. The first of
them is right; each next one is if the guess before it was. So a continuation is that of token-by-token
greedy decoding once a sweep confirms all of it: at least one more token is right after each (Jacobi
decoding: Santilli et al. 2023, arXiv:2305.10427), and a good guess takes one sweep.
"""

import torch
from torch import Tensor

from headrace.runtime.evaluation.measure import Progress
from headrace.runtime.sweep.sweep import Sweep


@torch.inference_mode()
def continue_greedily(
    sweep: Sweep, prompts: Tensor, guess: Tensor, progress: Progress
) -> tuple[Tensor, int]:
    """prompts [N, P], guess [N, M] -> continuations [N, M] int64, and sweeps that it took (at most M)."""
    most = guess.shape[1]
    for sweeps in range(1, most + 1):
        progress("continuations", sweeps - 1, most)
        said = _said(sweep, prompts, guess)
        if torch.equal(said, guess):
            break
        guess = said
    progress("continuations", most, most)
    return guess, sweeps


def _said(sweep: Sweep, prompts: Tensor, guess: Tensor) -> Tensor:
    """What the model says after the prompt and after each guess but the last."""
    tokens = torch.cat([prompts, guess], dim=1)
    with sweep.embed(tokens) as states:
        for layer in sweep.layers():
            layer.run(states)
        rows = states.values[:, prompts.shape[1] - 1 : -1].flatten(0, 1)
        likeliest = [sweep.logits(some).argmax(-1).cpu() for some in rows.split(sweep.logit_rows)]
    return torch.cat(likeliest).view(guess.shape)
