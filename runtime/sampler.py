"""Tokens from logits, on the stage of the last visit: batched, repeatable, one transfer back.

A row's token is a function of its logits, its parameters and (seed, position) alone. The order is
vLLM's: masks and biases, penalties, then greedy or temperature, top-k, top-p, min-p and the draw.
Log-probabilities are those of the raw logits.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from headrace.runtime.constraints import constrained
from headrace.scheduler.errors import StageError
from headrace.scheduler.plan import Sample, Sampling

Row = tuple[int, int, Sampling]
"""(request, position of the token to draw, how)."""

_GREEDY_BELOW = 1e-5  # vLLM's limit: a smaller temperature is greedy
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that were drawn, on their way to the host."""

    rows: Sequence[Row]
    table: Tensor
    """[R, columns] float64 on the host; written by a copy on the stream that drew them."""

    def collect(self) -> list[Sample]:
        """One sample a row. The caller has waited for the stream.

        Raises:
            StageError: a row has nan or +inf, or nothing but -inf; the message names the request.
        """
        tokens, top_scores = self.table[:, 0].long().tolist(), self.table[:, 1]
        if not top_scores.isfinite().all():
            raise _not_finite(self.rows, top_scores.tolist())
        if self.table.shape[1] == 2:  # a device waits for the host, and most want no more
            requests = (request for request, _, _ in self.rows)
            return list(map(Sample, requests, tokens, repeat(None), repeat(())))
        rest = self.table[:, 2:].tolist()
        return [_with_logprobs(*of_row) for of_row in zip(self.rows, tokens, rest, strict=True)]


def sample(logits: Tensor, rows: Sequence[Row], at_once: int = 64) -> list[Sample]:
    """`draw`, waited for and collected."""
    drawn = draw(logits, rows, at_once)
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return drawn.collect()


def draw(logits: Tensor, rows: Sequence[Row], at_once: int = 64) -> Drawn:
    """Draw one token a row from `logits` [R, vocabulary] float32, which is left as it is.

    The host does not wait for the device.

    Rows that are not greedy are drawn `at_once` at a time, in some 64 bytes per logit of them.

    -inf marks a token as impossible. Ties go to the lowest id when greedy; top-k and top-p keep
    all of equal logits at their edge. A sample's `top` holds the k most likely tokens by raw logits.
    """
    assert logits.dtype == torch.float32 and len(logits) == len(rows), (logits.shape, len(rows))
    if not rows:
        return Drawn(rows, torch.empty(0, 2))
    scores = _penalized(constrained(logits, [how for _, _, how in rows]), rows)
    top_score, tokens = scores.max(dim=-1)  # nan wins; among equals the first does
    drawn = [i for i, (_, _, how) in enumerate(rows) if how.temperature >= _GREEDY_BELOW]
    for width, members in _by_width(rows, drawn).items():
        for i in range(0, len(members), at_once):
            some = members[i : i + at_once]
            index = _to(torch.tensor(some), logits.device)
            tokens[index] = _draw_some(scores[index], [rows[j] for j in some], width)
    columns = [tokens.double()[:, None], top_score.double()[:, None]]
    wanted = [i for i, (_, _, how) in enumerate(rows) if how.logprobs is not None]
    if wanted:
        columns.append(_logprobs(logits, tokens, rows, wanted))
    # Ids are exact in float64, so everything crosses to the host together.
    table = torch.cat(columns, dim=1)
    if not table.is_cuda:
        return Drawn(rows, table)
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    return Drawn(rows, host.copy_(table, non_blocking=True))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^-52, that depends on (seed, position) alone.

    The `position`-th output of the SplitMix64 generator that starts at the hashed seed (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    return (_mix(_mix(seed & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) >> 12) * 2.0**-52


def _mix(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _to(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _penalized(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits with penalties applied where a token was seen; the same tensor when none is."""
    seen: list[tuple[int, int]] = []  # (row, token)
    terms: list[tuple[float, float]] = []  # (repetition, subtracted)
    for i, (_, _, how) in enumerate(rows):
        if not how.history:  # no penalties
            continue
        counts = Counter(how.history[how.num_prompt :])
        for token in set(how.history):
            if token < logits.shape[1]:  # some vocabularies have ids without a logit
                count = counts[token]
                subtracted = how.frequency_penalty * count + how.presence_penalty * (count > 0)
                seen.append((i, token))
                terms.append((how.repetition_penalty, subtracted))
    if not seen:
        return logits
    row, token = _to(torch.tensor(seen).T.contiguous(), logits.device)
    repetition, penalty = _to(torch.tensor(terms).T.contiguous(), logits.device)
    old = logits[row, token]
    new = torch.where(old > 0, old / repetition, old * repetition) - penalty
    return logits.index_put((row, token), new)


def _by_width(rows: Sequence[Row], drawn: list[int]) -> dict[int, list[int]]:
    """Rows by how many of the largest logits their filters look at; -1 is all of them.

    Only top-p without top-k has to sort the vocabulary, and only for its own rows.
    """
    groups: dict[int, list[int]] = {}
    for i in drawn:
        how = rows[i][2]
        if how.top_k > 0:
            width = 1 << (how.top_k - 1).bit_length()
        elif how.top_p < 1.0:
            width = -1
        else:
            width = 1
        groups.setdefault(width, []).append(i)
    return groups


def _draw_some(logits: Tensor, rows: Sequence[Row], width: int) -> Tensor:
    """One token a row, by inverting the distribution function in the order of token ids. [n]."""
    parameters = _to(torch.tensor([_parameters(row) for row in rows]).double(), logits.device)
    temperature, u = parameters[:, 0:1], parameters[:, 4:5]
    scaled = logits.double() / temperature
    largest = _largest(scaled, width)  # [n, width], falling
    threshold = _threshold(largest, parameters)
    weights = torch.exp(scaled - largest[:, :1])
    weights = weights.masked_fill_(scaled < threshold, 0.0)
    below = weights.cumsum(dim=-1)
    # u <= 1 - 2^-52, so the product stays under the total, and the token found has weight.
    token = torch.searchsorted(below, u * below[:, -1:], right=True)[:, 0]
    return token.clamp_(max=logits.shape[1] - 1)


def _parameters(row: Row) -> tuple[float, float, float, float, float]:
    """temperature, top_k, top_p, log of min_p, and the random number."""
    _, position, how = row
    return (
        how.temperature,
        float(how.top_k) if how.top_k > 0 else math.inf,
        how.top_p,
        math.log(how.min_p) if how.min_p > 0 else -math.inf,
        uniform(how.seed, position),
    )


def _largest(scaled: Tensor, width: int) -> Tensor:
    if width == 1:
        return scaled.amax(dim=-1, keepdim=True)
    if width < 0 or width >= scaled.shape[1]:
        return scaled.sort(dim=-1, descending=True).values
    return scaled.topk(width, dim=-1).values


def _threshold(largest: Tensor, parameters: Tensor) -> Tensor:
    """The smallest scaled logit that top-k, top-p (of what top-k left) and min-p all keep. [n, 1].

    A row without top-k and top-p has a single largest logit to look at, and keeps everything that
    min-p does.
    """
    top_k, top_p, log_min_p = (parameters[:, i : i + 1] for i in (1, 2, 3))
    rank = torch.arange(largest.shape[1], device=largest.device)
    inside = rank < top_k
    weights = torch.exp(largest - largest[:, :1]).masked_fill_(~inside, 0.0)
    before = weights.cumsum(dim=-1) - weights
    # Rounding must not cut what top_p = 1 keeps.
    inside &= (before < top_p * weights.sum(dim=-1, keepdim=True)) | (top_p >= 1.0)
    last = (inside.sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
    edge = largest.gather(1, last)
    edge = edge.masked_fill((top_k == math.inf) & (top_p >= 1.0), -math.inf)
    return torch.maximum(edge, largest[:, :1] + log_min_p)


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[Row], wanted: list[int]) -> Tensor:
    """[R, 1 + 2k] float64: the token's logprob, the k likeliest ids, their logprobs."""
    most = min(max(rows[i][2].logprobs or 0 for i in wanted), logits.shape[1])
    index = _to(torch.tensor(wanted), logits.device)
    raw = logits[index]
    total = raw.logsumexp(dim=-1, keepdim=True)
    chosen = raw.gather(1, tokens[index, None]) - total
    values, ids = raw.topk(most, dim=-1)
    out = logits.new_zeros((len(rows), 1 + 2 * most), dtype=torch.float64)
    out[index] = torch.cat([chosen.double(), ids.double(), (values - total).double()], dim=1)
    return out


def _not_finite(rows: Sequence[Row], top_scores: list[float]) -> StageError:
    i, top_score = next((i, x) for i, x in enumerate(top_scores) if not math.isfinite(x))
    request, position, _ = rows[i]
    return StageError(
        f"request {request}: the logits for position {position} are not finite (largest is "
        f"{top_score}); its weights, keys or activations are damaged or overflowed. Check the "
        "store, or run the model in a type with a wider range (bfloat16 instead of float16)"
    )


def _with_logprobs(row: Row, token: int, values: list[float]) -> Sample:
    request, _, how = row
    if how.logprobs is None:
        return Sample(request, token, None, ())
    most = (len(values) - 1) // 2
    ids, logprobs = values[1 : 1 + most], values[1 + most :]
    top = tuple((int(i), p) for i, p in zip(ids, logprobs, strict=True))[: how.logprobs]
    return Sample(request, token, values[0], top)
