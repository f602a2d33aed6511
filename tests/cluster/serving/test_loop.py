"""The thread that owns an engine, with real passes."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import wait_for
from served import stories_engine

from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.loop import EngineLoop, News
from headrace.scheduler.errors import ContextLengthError, HeadraceError, RequestError
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams

PROMPT = [5, 6, 7, 8]
LONG = SamplingParams(max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[Engine]:
    with stories_engine(stories) as made:
        yield made


class Running:
    """A loop whose news go to the generations, as on an event loop."""

    def __init__(self, engine: Engine) -> None:
        self.events = asyncio.get_running_loop()
        self.errors: list[HeadraceError] = []
        self.loop = EngineLoop(engine, self._post, self.errors.append)
        self.loop.start()

    def _post(self, news: list[News]) -> None:
        self.events.call_soon_threadsafe(self._feed, news)

    def _feed(self, news: list[News]) -> None:
        for each in news:
            if each.error is not None:
                each.generation.fail(each.error)
            else:
                each.generation.feed(each.index, each.samples, each.completion)

    async def close(self) -> None:
        await asyncio.to_thread(self.loop.close)
        assert not self.errors


def used(running: Running) -> int:
    return running.loop.state.kv.device.used


async def read_all(generation: Generation) -> tuple[list[list[int]], dict[int, Completion]]:
    tokens: list[list[int]] = [[] for _ in generation.orders]
    done = {}
    while news := await generation.read():
        for progress in news:
            tokens[progress.index] += [sample.token for sample in progress.samples]
            if progress.completion is not None:
                done[progress.index] = progress.completion
    return tokens, done


def test_an_engine_hands_out_tokens_as_it_commits_them(engine: Engine) -> None:
    heard: list[Sample] = []
    params = SamplingParams(max_tokens=6, logprobs=1)
    one = engine.add(PROMPT, params, 1, on_token=heard.append)
    other = engine.add(PROMPT, params, 2)
    counts, done = [], {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
        counts.append(len(heard))
    assert heard == done[one].logprobs
    assert len(done[other].token_ids) == 6
    assert counts == sorted(counts)
    assert len(set(counts)) > 4  # not all at the end


def test_an_engine_says_what_it_would_refuse(engine: Engine) -> None:
    engine.check(PROMPT, LONG)
    with pytest.raises(ContextLengthError, match="the prompt has 1024 tokens"):
        engine.check([5] * 1024, LONG)
    with pytest.raises(RequestError, match="empty"):
        engine.check([], LONG)
    assert not engine.has_work


def test_a_listener_does_not_hear_of_a_request_that_was_given_up(engine: Engine) -> None:
    heard: list[Sample] = []
    request = engine.add(PROMPT, LONG, 1, on_token=heard.append)
    while not heard:
        engine.step()
    engine.abort(request)
    count = len(heard)
    while engine.has_work:
        engine.step()
    assert len(heard) == count
    assert engine.stats.kv.device.used == 0


def test_sequences_come_to_their_generation(engine: Engine) -> None:
    async def work() -> None:
        running = Running(engine)
        orders = [Order(PROMPT, SamplingParams(max_tokens=4 + i), i) for i in range(3)]
        generation = Generation(orders)
        assert generation.num_waiting == 3
        running.loop.submit(generation)
        tokens, done = await read_all(generation)
        assert generation.num_waiting == 0
        assert generation.has_ended
        assert [len(each) for each in tokens] == [4, 5, 6]
        assert [done[i].token_ids for i in range(3)] == tokens
        assert await generation.read() == []
        await running.close()

    asyncio.run(work())


def test_what_is_given_up_gives_its_pages_back_and_the_loop_sleeps(engine: Engine) -> None:
    async def work() -> None:
        running = Running(engine)
        gone, stays = (Generation([Order(PROMPT, LONG, seed)]) for seed in (1, 2))
        running.loop.submit(gone)
        running.loop.submit(stays)
        await gone.read()
        await stays.read()
        running.loop.abort(gone)
        while running.loop.state.running != 1:
            await stays.read()
        running.loop.abort(stays)
        running.loop.abort(stays)
        await asyncio.to_thread(wait_for, lambda: not used(running), 10.0, lambda: "pages are held")
        passes = engine.stats.passes
        await asyncio.sleep(0.1)
        assert engine.stats.passes == passes
        await running.close()

    asyncio.run(work())


def test_a_refusal_is_one_generations_alone(engine: Engine) -> None:
    async def work() -> None:
        running = Running(engine)
        wrong = Generation([Order(PROMPT, LONG, 1), Order([5] * 2000, LONG, 1)])
        right = Generation([Order(PROMPT, SamplingParams(max_tokens=2), 1)])
        running.loop.submit(wrong)
        running.loop.submit(right)
        with pytest.raises(RequestError, match="2000 tokens"):
            await read_all(wrong)
        assert len((await read_all(right))[0][0]) == 2
        await running.close()

    asyncio.run(work())
    while engine.has_work:
        engine.step()
    assert engine.stats.kv.device.used == 0
