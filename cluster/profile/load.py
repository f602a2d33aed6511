"""What a run does while its memory is measured: random prompts as long as the plan allows, or a job's rows."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.cluster.bench.driver import random_prompts
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.engine import Engine
from headrace.cluster.inputs import open_input
from headrace.cluster.profile.request import Done, Load
from headrace.cluster.rows import decode, prepare
from headrace.cluster.seeds import row_seed
from headrace.scheduler.errors import HeadraceError, RequestError
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Plan
from headrace.scheduler.request import SamplingParams

ROW_TOKENS = 256
"""Of the answer of a row that does not say, as in `headrace generate`."""

NEW_TOKENS = 16
"""Tokens that each random prompt is continued with."""


@dataclass(frozen=True, slots=True)
class Work:
    token_ids: list[int]
    params: SamplingParams
    seed: int
    adapter: str | None = None


def work_of(engine: Engine, load: Load, vocabulary: int) -> list[Work]:
    """What is to be run. HeadraceError for rows that cannot be."""
    if load.rows is not None:
        return [*_rows(engine, load.rows)]
    context = load.context or engine.max_context
    if context > engine.max_context:
        raise HeadraceError(
            f"--tokens {context} are more than a sequence may have here, {engine.max_context}: give fewer, or "
            f"--context {context}"
        )
    count = load.sequences or at_once(engine.plan, context)
    new = max(1, min(NEW_TOKENS, context // 2))
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    prompts = random_prompts(count, context - new, vocabulary)
    return [Work(prompt, params, i) for i, prompt in enumerate(prompts)]


def at_once(plan: Plan, context: int) -> int:
    """How many sequences of so many tokens run at once, at least one."""
    room = plan.num_pages // pages_for(context) + plan.prediction.guests
    return max(1, min(plan.max_sequences * plan.passes_in_flight, room, plan.num_tails or room))


def _rows(engine: Engine, path: Path) -> Iterator[Work]:
    encoder, defaults = Encoder(engine.tokenizer), SamplingParams(max_tokens=ROW_TOKENS)
    for number, raw in open_input(path):
        try:
            row = prepare(
                decode(number, raw, b""), encoder, defaults, engine.max_context, engine.adapters
            )
            one = replace(row.params, n=1)
            engine.check(row.token_ids, one)  # compiles its grammar, if it has one
        except RequestError as error:
            raise HeadraceError(f"--input {path}, row {number}: {error}") from error
        for index in range(row.params.n):
            seed = row_seed(engine.model_digest, row, None, index)
            yield Work(row.token_ids, one, seed, row.adapter)


def run_load(engine: Engine, work: list[Work], seconds: float) -> Done:
    """Until all of it is done or the time is over; what runs then is given up."""
    started, passes, finished = time.monotonic(), 0, 0
    ids = [engine.add(w.token_ids, w.params, w.seed, adapter=w.adapter) for w in work]
    while engine.has_work and time.monotonic() - started < seconds:
        finished += len(engine.step())
        passes += 1
    for request_id in ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    longest = max((len(one.token_ids) + one.params.max_tokens for one in work), default=0)
    return Done(len(work), finished, longest, passes, time.monotonic() - started)
