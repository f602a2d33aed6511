"""Driving an engine pass by pass, and which of its passes were steady decodes."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch

from headrace.cluster.engine import Engine
from headrace.cluster.job_report import Work
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.request import SamplingParams
from headrace.scheduler.speculation import DraftCounts


def random_prompts(count: int, tokens: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    """Prompts of ids below `vocabulary` that share no prefix."""
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Step:
    """One pass as the engine saw it: wall seconds, tokens committed, requests that ended, guesses."""

    seconds: float
    committed: int
    ended: int
    stages: tuple[StageTimes, ...]
    drafts: DraftCounts = field(default_factory=DraftCounts)

    @property
    def drew(self) -> int:
        """Sequences that it gave a token."""
        return self.drafts.decodes or self.committed


@dataclass(slots=True)
class DeviceMeter:
    """Highest device memory in use above `base`, over all processes; zeros without CUDA."""

    base: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.base = self._used()
        self.peak = list(self.base)

    def sample(self) -> None:
        self.peak = [max(a, b) for a, b in zip(self.peak, self._used(), strict=True)]

    @property
    def most(self) -> int:
        return max((b - a for a, b in zip(self.base, self.peak, strict=True)), default=0)

    @staticmethod
    def _used() -> list[int]:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        pairs = (torch.cuda.mem_get_info(i) for i in range(count))
        return [total - free for free, total in pairs]


class Driver:
    """Runs requests through an engine and notes every pass."""

    def __init__(self, engine: Engine, meter: DeviceMeter | None = None) -> None:
        self._engine = engine
        self._meter = meter
        self.steps: list[Step] = []

    def add(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self._engine.add(list(prompt), params, seed=i)

    def run(self) -> None:
        while self._engine.has_work:
            self.step()

    def step(self) -> Step:
        """HeadraceError when another ring has taken the place of the one that was measured until now."""
        before = Work.of(self._engine.stats)
        started = time.perf_counter()
        ended = len(self._engine.step())
        seconds = time.perf_counter() - started
        work = Work.of(self._engine.stats).since(before)
        if work.moves:
            raise HeadraceError(
                f"a node was lost, and the model planned anew for {len(work.stages)} stages: passes before"
                " and after that cannot be measured together. Start again"
            )
        step = Step(seconds, work.output_tokens, ended, work.stages, work.drafts)
        self.steps.append(step)
        if self._meter is not None and len(self.steps) % 4 == 1:
            self._meter.sample()
        return step


@dataclass(frozen=True, slots=True)
class Steady:
    """Rounds in which sequences advance by one token, and what came before.

    A round is as many passes as there are in flight. `rounds` are seconds, `tokens` what one commits on
    average: one a sequence and more where guesses, `drafts`, were right, or fewer where some of them gave
    up turns for their pages. `stages` the medians of
    each stage's times and bytes over them, `prefill_stages` their sums over what came before.
    """

    prefill_seconds: float
    rounds: tuple[float, ...]
    stages: tuple[StageTimes, ...]
    prefill_stages: tuple[StageTimes, ...]
    prefill_passes: int
    tokens: float
    drafts: DraftCounts = field(default_factory=DraftCounts)

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


def steady(steps: Sequence[Step], batch: int, passes_in_flight: int) -> Steady:
    """The rounds of decodes only: after all prompts are computed, until the first request ends.

    Raises HeadraceError when there are none, because prompts took longer than outputs.
    """
    width = passes_in_flight
    # A request is in one pass of a round at most. The first round that gives every sequence a token
    # may have had prompts in it, the next one has not.
    first = next(
        (
            end
            for end in range(width, len(steps) + 1)
            if sum(step.drew for step in steps[end - width : end]) >= batch
        ),
        len(steps),
    )
    end = next((i for i, step in enumerate(steps) if step.ended), len(steps))
    rounds = [steps[i : i + width] for i in range(first, end - width + 1, width)]
    if not rounds:
        raise HeadraceError(
            f"no pass decoded all {batch} sequences and nothing else; give more new tokens or fewer "
            "prompt tokens"
        )
    before = [step.stages for step in steps[:first]]
    return Steady(
        sum(step.seconds for step in steps[:first]),
        tuple(sum(step.seconds for step in one) for one in rounds),
        tuple(_median(rounds, stage) for stage in range(len(steps[0].stages))),
        tuple(reduce(StageTimes.plus, of_one) for of_one in zip(*before, strict=True)),
        len(before),
        statistics.mean(sum(step.committed for step in one) for one in rounds),
        reduce(DraftCounts.plus, (step.drafts for one in rounds for step in one)),
    )


def _median(rounds: Sequence[Sequence[Step]], stage: int) -> StageTimes:
    def middle(name: str) -> float:
        totals = [sum(getattr(step.stages[stage], name) for step in one) for one in rounds]
        return float(statistics.median(totals))

    return StageTimes(
        stage,
        middle("total"),
        middle("weights_wait"),
        middle("link_wait"),
        int(middle("nvme_bytes")),
        int(middle("host_bytes")),
        int(middle("experts_used")),
        int(middle("experts_loaded")),
        middle("kv_wait"),
        int(middle("kv_out_bytes")),
        int(middle("kv_in_bytes")),
        int(middle("kv_cold_bytes")),
        int(middle("kv_sunk_bytes")),
        int(middle("adapter_bytes")),
    )
