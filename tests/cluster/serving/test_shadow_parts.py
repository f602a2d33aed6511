"""What a shadow samples, when it compares, and what it refuses before a server starts."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import STORIES
from stored import tiny_store

from headrace.cluster.cli.main import main
from headrace.cluster.completion import Completion
from headrace.cluster.serving.generation import Order
from headrace.cluster.serving.shadow.check import check_shadow
from headrace.cluster.serving.shadow.options import ShadowOptions, parse_share
from headrace.cluster.serving.shadow.samples import Lottery, SampleQueue
from headrace.cluster.serving.shadow.shadow import Shadow, is_plainly_greedy
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.request import SamplingParams
from headrace.scheduler.structured import StructuredOutputsParams

MEMORY = 256 << 20


def test_a_lottery_draws_its_share_and_the_same_again() -> None:
    drawn = [i for i in range(100_000) if Lottery(0.01, b"one").draws(i)]
    assert 850 < len(drawn) < 1150
    assert all(Lottery(0.01, b"one").draws(i) for i in drawn)
    assert sum(Lottery(0.01, b"two").draws(i) for i in drawn) < 40
    assert all(map(Lottery(1.0, b"one").draws, range(1000)))


def test_a_queue_has_a_bound_and_batches_have_one() -> None:
    now = [5.0]
    queue = SampleQueue(600, 128, lambda: now[0])
    queue.offer(range(100), range(29), greedy=True)  # longer than sequences may be
    queue.offer(range(5), [], greedy=True)  # nothing was answered
    for size in (10, 60, 100, 128):
        queue.offer(range(size - 4), range(4), greedy=True)
        now[0] += 1
    queue.offer(range(300), range(3), greedy=True)
    assert queue.oldest == 5.0 and queue.tokens == 298
    assert queue.dropped == {"long": 2}
    first = queue.take(256)  # two of 64; with the third they would be three of 128
    assert [len(sample.tokens) for sample in first] == [10, 60]
    assert (first[0].prompt, first[0].tokens.tolist()) == (6, [*range(6), *range(4)])
    assert queue.oldest == 7.0
    queue.offer(range(100), range(4), greedy=True)
    for _ in range(2):
        queue.offer(range(100), range(4), greedy=True)
    # Those that are being compared are still there.
    assert queue.tokens == 298 + 2 * 104 and queue.dropped["full"] == 1
    queue.release(first)
    assert queue.tokens == 228 + 2 * 104
    queue.offer(range(64), range(4), greedy=True)
    second = queue.take(1)  # one at least
    assert [len(sample.tokens) for sample in second] == [100]
    queue.release(second, "failed")
    assert queue.dropped["failed"] == 1


@pytest.mark.parametrize(
    ("changed", "is_greedy"),
    [
        ({}, True),
        ({"top_p": 0.5, "stop": "x", "ignore_eos": True, "logprobs": 2}, True),
        ({"temperature": 0.2}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"presence_penalty": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, False),
    ],
)
def test_only_plainly_greedy_tokens_are_held_against_a_ring(
    changed: dict[str, object], is_greedy: bool
) -> None:
    assert is_plainly_greedy(SamplingParams(**{"temperature": 0, **changed})) is is_greedy


def test_answers_with_an_adapter_are_those_of_another_model(stories: Path) -> None:
    options = ShadowOptions(stories, stories, sample=1.0, memory=MEMORY)
    shadow = Shadow(options, check_shadow(options), lambda: True)
    for adapter in ("pirate", None):
        order = Order([5, 6], SamplingParams(temperature=0), 0, adapter=adapter)
        shadow.offer(order, Completion(1, [7, 8], "", "length", None, 2))
    assert shadow.queue.tokens == 4 and not shadow.queue.dropped


def test_shares_are_percents_or_numbers() -> None:
    assert [parse_share(text) for text in ("1%", "100%", "0.5 %", "0.01", "1")] == [
        0.01, 1.0, 0.005, 0.01, 1.0,
    ]  # fmt: skip
    for text in ("0", "0%", "101%", "2", "1%%", "a", "", "nan", "-1%"):
        with pytest.raises(HeadraceError, match="no share of all requests"):
            parse_share(text)


def test_what_cannot_be_compared_is_one_message(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_store("llama", tmp_path)
    shadow = ["--shadow", STORIES]
    for given, message in (
        (["--shadow-sample", "1%"], "give --shadow REFERENCE with them"),
        ([*shadow, "--shadow-sample", "2"], "is no share of all requests"),
        ([*shadow, "--shadow-memory", "much"], "is not a size"),
        ([*shadow, "--shadow-memory", "1MiB"], "--shadow-memory 1.00 MiB is too little"),
        (["--shadow", other], "Give stores of one model and its own checkpoint"),
        (["--shadow", tmp_path / "none"], "none"),
        ([*shadow, "--shadow-device", "cuda"], "PyTorch sees no CUDA device"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, ["serve", stories, "--device", "cpu", "--port", 0, *given])))
        assert ended.value.code == 1, given
        told = " ".join(capsys.readouterr().err.split())
        assert message in told and "Traceback" not in told, told


def test_another_tokenizer_is_refused(stories: Path, tmp_path: Path) -> None:
    for file in STORIES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HeadraceError, match="has another tokenizer than"):
        check_shadow(ShadowOptions(stories, tmp_path))


def test_what_fits_the_memory_is_planned(stories: Path) -> None:
    little = check_shadow(ShadowOptions(stories, stories, memory=96 << 20))
    much = check_shadow(ShadowOptions(stories, stories, memory=1 << 30, context=100))
    assert little.longest <= little.padded < much.padded
    assert little.micro_batch <= much.micro_batch == 2048 and much.longest == 100


async def _until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def _holds(stories: Path) -> None:
    options = ShadowOptions(stories, stories, sample=1.0, memory=MEMORY, patience=1e9)
    busy = [True]
    shadow = Shadow(options, check_shadow(options), lambda: busy[0], os.urandom(16))
    shadow.start()
    order = Order(list(range(5, 20)), SamplingParams(temperature=0), 0)
    shadow.offer(order, Completion(1, list(range(30, 50)), "", "length", None, 15))
    await asyncio.sleep(5.0)
    assert shadow.pid is None  # not while somebody is there
    busy[0] = False
    await _until(lambda: shadow.pid is not None)
    busy[0] = True
    assert shadow.pid is not None
    process, used = psutil.Process(shadow.pid), -1.0
    for _ in range(45):  # it starts, opens its models, and holds before the first layer
        before, used = used, sum(process.cpu_times()[:2])
        if used > 2.0 and used - before < 0.02:
            break
        await asyncio.sleep(2.0)
    else:
        raise AssertionError("it goes on while somebody waits")
    assert shadow.totals.last is None
    busy[0] = False
    await _until(lambda: shadow.totals.last is not None)
    assert shadow.totals.tokens == 20 and shadow.totals.restarts == 0
    await shadow.close()
    assert not psutil.pid_exists(process.pid)


async def _is_patient(stories: Path) -> None:
    """A server that is never idle is watched, too."""
    options = ShadowOptions(stories, stories, sample=1.0, memory=MEMORY, patience=0.5)
    shadow = Shadow(options, check_shadow(options), lambda: True)
    shadow.start()
    order = Order(list(range(5, 20)), SamplingParams(temperature=0), 0)
    shadow.offer(order, Completion(1, list(range(30, 50)), "", "length", None, 15))
    await _until(lambda: shadow.totals.sequences == 1)
    await shadow.close()


async def _outlives_its_reference(stories: Path, gone: Path) -> None:
    options = ShadowOptions(stories, gone, sample=1.0, memory=MEMORY, patience=0.0)
    shadow = Shadow(options, check_shadow(options), lambda: True)
    await asyncio.to_thread(gone.rename, gone.with_name("elsewhere"))
    shadow.start()
    order = Order(list(range(5, 20)), SamplingParams(temperature=0), 0)
    shadow.offer(order, Completion(1, list(range(30, 50)), "", "length", None, 15))
    await _until(lambda: shadow.queue.dropped["failed"] == 1)
    assert shadow.queue.tokens == 0 and shadow.totals.restarts == 0
    await asyncio.to_thread(gone.with_name("elsewhere").rename, gone)
    shadow.offer(order, Completion(2, list(range(30, 50)), "", "length", None, 15))
    await _until(lambda: shadow.totals.sequences == 1)
    await shadow.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_holds_while_somebody_waits(stories: Path) -> None:
    asyncio.run(_holds(stories))


def test_patience_has_an_end(stories: Path) -> None:
    asyncio.run(_is_patient(stories))


@pytest.mark.slow
def test_a_reference_that_cannot_be_read_is_a_dropped_sample(
    stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stories, tmp_path / "gone")
    asyncio.run(_outlives_its_reference(stories, tmp_path / "gone"))
    assert "could not compare answers" in caplog.text
