"""How likely given continuations are, of many requests by one sweep."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.evaluation.measure import Progress
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import Sweep

STEP = 64
"""Sequences are padded to multiples of it, and those of a length are swept together."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of a continuation: log p in nats, and whether greedy decoding would give it."""

    log: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """`tokens`, of which the last `count` are the continuation; there is at least one before it."""

    tokens: tuple[int, ...]
    count: int


@torch.inference_mode()
def likelihoods(sweep: Sweep, requests: Sequence[Scored], progress: Progress) -> list[Likelihood]:
    """In the order of the requests. Every layer is read once, whatever they are.

    A sequence has at most `context` + 1 tokens: its last one is not computed with.
    """
    groups = _groups(requests)
    found: dict[int, Likelihood] = {}
    with ExitStack() as stack:
        states = {
            length: stack.enter_context(sweep.embed(_padded(requests, members, length, sweep)))
            for length, members in groups.items()
        }
        for layer in sweep.layers():
            progress("layers", layer.index, sweep.num_layers)
            for group in states.values():
                layer.run(group)
        progress("layers", sweep.num_layers, sweep.num_layers)
        for length, members in groups.items():
            for row, request in enumerate(members):
                found[request] = _likelihood(sweep, states[length], row, requests[request])
    return [found[i] for i in range(len(requests))]


def _groups(requests: Sequence[Scored]) -> dict[int, list[int]]:
    """Requests by the multiple of STEP that has room for their inputs."""
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        assert 0 < request.count < len(request.tokens), request
        length = -(-(len(request.tokens) - 1) // STEP) * STEP
        groups.setdefault(length, []).append(index)
    return dict(sorted(groups.items()))


def _padded(
    requests: Sequence[Scored], members: Sequence[int], length: int, sweep: Sweep
) -> Tensor:
    tokens = torch.zeros(len(members), min(length, sweep.context), dtype=torch.int64)
    for row, index in zip(tokens, members, strict=True):
        inputs = requests[index].tokens[:-1]
        row[: len(inputs)] = torch.tensor(inputs)
    return tokens


def _likelihood(sweep: Sweep, states: States, row: int, request: Scored) -> Likelihood:
    end = len(request.tokens) - 1
    rows = states.values[row, end - request.count : end]
    wanted = torch.tensor(request.tokens[-request.count :]).to(sweep.device)
    total, greedy = 0.0, True
    pieces = zip(rows.split(sweep.logit_rows), wanted.split(sweep.logit_rows), strict=True)
    for piece, targets in pieces:
        logs = sweep.logits(piece).log_softmax(-1)
        total += logs.gather(1, targets[:, None]).double().sum().item()
        greedy = greedy and torch.equal(logs.argmax(-1), targets)
    return Likelihood(total, greedy)
