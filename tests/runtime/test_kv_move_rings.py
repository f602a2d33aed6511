"""Real stages move pages while they compute, and no move changes an answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from rings import local_ring, manual_plan
from slow_log import SlowLog

from headrace.cluster.pipeline import LocalPipeline, Pending
from headrace.cluster.wire import decode, encode
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.runtime.trace import Kind
from headrace.scheduler.errors import StageError
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import (
    FOLLOWS,
    MicroBatch,
    MoveKind,
    PageMove,
    Pass,
    PassResult,
    Sampling,
    Slice,
)

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())
OUT, IN, SPILL, FETCH, _ = MoveKind
RINGS: list[dict[str, Any]] = [
    {"stages": 1, "tier": Tier.DEVICE},
    {"stages": 2, "cyclic": True},
    {"stages": 3, "tier": [Tier.NVME, Tier.HOST, Tier.DEVICE]},
]
TAIL_PAGE = 9
"""Where the newest page stays while the others move."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=["llama", "gpt_oss"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Global attention; windows of 8 beside it, sinks and experts."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store"


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())


class Driver:
    """Hands a ring passes of one slice, or of none, and notes what their moves came to."""

    def __init__(self, pipeline: LocalPipeline) -> None:
        self._pipeline = pipeline
        self._step = self._number = 0
        self.moved: list[list[int]] = []
        self.lost: list[list[int]] = []

    def move(self, kind: MoveKind, slot: int, page: int = -1, key: bytes = b"") -> PageMove:
        self._number += 1
        return PageMove(self._number, kind, slot, page, key, 0)

    def submit(
        self, *pieces: Slice, moves: Sequence[PageMove] = (), follows: int | None = None
    ) -> Pending:
        self._step += 1
        batches = (MicroBatch(pieces),) if pieces else ()
        a_pass = Pass(self._step, batches, follows, tuple(moves))
        return self._pipeline.submit(decode(encode(a_pass), Pass))

    def take(self, pending: Pending) -> list[PassResult]:
        results = pending.result()
        self.moved = self.moved or [[] for _ in results]
        self.lost = self.lost or [[] for _ in results]
        for i, result in enumerate(results):
            assert decode(encode(result), PassResult) == result
            self.moved[i] += result.moved
            self.lost[i] += result.lost
        return results

    def run(self, piece: Slice, moves: Sequence[PageMove] = ()) -> int:
        """The token that is drawn after the slice."""
        results = self.take(self.submit(piece, moves=moves))
        (sample,) = (sample for result in results for sample in result.samples)
        return sample.token

    def wait(self, *moves: PageMove) -> list[PassResult]:
        """A pass of moves alone."""
        return self.take(self.submit(moves=moves))

    def decode(self, tokens: list[int], pages: tuple[int, ...], count: int) -> None:
        """Continue request 1, whose last token is not computed, by so many tokens."""
        for _ in range(count):
            start = len(tokens) - 1
            tokens.append(self.run(Slice(1, start, (tokens[-1],), pages, GREEDY)))

    def begin(self, pages: tuple[int, ...]) -> list[int]:
        """Request 1: two full pages and some; its tokens and the first that is drawn."""
        start = prompt(1, 140)
        return [*start, self.run(Slice(1, 0, start, pages, GREEDY))]

    def overwrite(self, pages: tuple[int, ...]) -> None:
        """Another request takes the pages, and another tail."""
        self.run(Slice(2, 0, prompt(2, 64 * len(pages)), pages, GREEDY, tail=1))


def plan_of(store: Path, ring: dict[str, Any], **more: Any) -> Plan:
    return manual_plan(Store.open(store), **{"num_pages": 10, "host_pages": 4} | ring | more)


def undisturbed(store: Path, ring: dict[str, Any], count: int, device: str = "cpu", **more: Any) -> list[int]:  # fmt: skip
    with local_ring(store, plan_of(store, ring, host_pages=0, **more), device) as pipeline:
        driver, pages = Driver(pipeline), (0, 1, TAIL_PAGE)
        tokens = driver.begin(pages)
        driver.decode(tokens, pages, count)
        return tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("ring", RINGS, ids=lambda ring: f"{ring['stages']}-stages")
def test_pages_go_and_come_back_and_the_tokens_are_the_same(
    store: Path, ring: dict[str, Any], kv_format: str, device: str
) -> None:
    want = undisturbed(store, ring, 8, device, kv_format=kv_format)
    plan = plan_of(store, ring, kv_format=kv_format)
    with local_ring(store, plan, device) as pipeline:
        driver, pages = Driver(pipeline), (0, 1, TAIL_PAGE)
        tokens = driver.begin(pages)
        # It goes on computing over pages that are being copied.
        outs = [driver.move(OUT, 3, 0), driver.move(OUT, 1, 1)]
        start = len(tokens) - 1
        last = Slice(1, start, (tokens[-1],), pages, GREEDY)
        tokens.append(driver.run(last, moves=outs))
        driver.decode(tokens, pages, 2)
        driver.wait()
        assert driver.moved == [[1, 2]] * ring["stages"]
        driver.overwrite((1, 0))
        results = driver.wait(driver.move(IN, 3, 5), driver.move(IN, 1, 2))
        assert driver.moved == [[1, 2, 3, 4]] * ring["stages"] and not any(driver.lost)
        check_times(results, plan)
        driver.overwrite((1, 0))
        driver.decode(tokens, (5, 2, TAIL_PAGE), 5)
        assert tokens == want


def check_times(results: list[PassResult], plan: Plan) -> None:
    """Of a pass that brought two pages in and computed nothing."""
    for stage, result in enumerate(results):
        times = result.times
        assert result.samples == () and times.stage == stage
        assert times.nvme_bytes == times.host_bytes == times.kv_out_bytes == 0
        assert times.kv_in_bytes > 0 and times.kv_in_bytes % 2 == 0
        assert 0 < times.kv_wait <= times.total


def test_pages_of_other_contents_give_other_tokens(llama: Path) -> None:
    """Else the test above would prove nothing."""
    want = undisturbed(llama, RINGS[0], 8)
    with local_ring(llama, plan_of(llama, RINGS[0])) as pipeline:
        driver, pages = Driver(pipeline), (0, 1, TAIL_PAGE)
        tokens = driver.begin(pages)
        driver.overwrite((1, 0))
        driver.decode(tokens, pages, 8)
        assert tokens != want


@pytest.mark.parametrize("ring", RINGS, ids=lambda ring: f"{ring['stages']}-stages")
def test_pages_go_to_a_log_and_come_back(llama: Path, ring: dict[str, Any], tmp_path: Path) -> None:
    want = undisturbed(llama, ring, 6)
    logs = [SlowLog(tmp_path / str(stage)) for stage in range(ring["stages"])]
    with local_ring(llama, plan_of(llama, ring), logs=logs) as pipeline:
        driver, keys = Driver(pipeline), (b"first", b"second")
        tokens = driver.begin((0, 1, TAIL_PAGE))
        for kind in (OUT, SPILL):
            driver.wait(*(driver.move(kind, i, i, keys[i]) for i in (0, 1)))
        driver.overwrite((0, 1))
        driver.wait(driver.move(OUT, 0, 0), driver.move(OUT, 1, 1))
        for kind in (FETCH, IN):
            driver.wait(*(driver.move(kind, 3 - i, 5 + i, keys[i]) for i in (0, 1)))
        assert not any(driver.lost)
        driver.decode(tokens, (5, 6, TAIL_PAGE), 6)
        assert tokens == want


def test_a_page_that_an_earlier_pass_is_still_writing_leaves_whole(llama: Path) -> None:
    """The pass that fills it, the one that takes it out and more are submitted at once."""
    ring = RINGS[1] | {"ahead": 1, "passes_in_flight": 3}
    with local_ring(llama, plan_of(llama, ring)) as pipeline:
        driver, pages = Driver(pipeline), (0, 1, TAIL_PAGE)
        start = prompt(1, 127)
        filling = driver.submit(Slice(1, 0, start, pages, GREEDY))
        last = driver.submit(Slice(1, 127, (FOLLOWS,), pages, GREEDY), follows=1)
        beyond = Slice(1, 128, (FOLLOWS,), pages, GREEDY)
        moves = [driver.move(OUT, 0, 0), driver.move(OUT, 1, 1)]
        leaving = driver.submit(beyond, moves=moves, follows=2)
        done = driver.submit()
        results = [driver.take(one) for one in (filling, last, leaving, done)]
        assert driver.moved == [[1, 2]] * 2 and all(sum(r.times.kv_wait for r in results[i]) == 0 for i in range(3))  # fmt: skip
        for stage in pipeline._stages:
            assert stage._moves is not None
            for slot, page in ((0, 0), (1, 1)):
                copies = stage._moves._host.layers(slot)
                for layer, copy in zip(stage._kv.layers, copies, strict=True):
                    assert torch.equal(copy, stage._kv.pages(layer)[page])


def test_a_slow_log_holds_up_no_pass_but_the_one_that_waits(llama: Path, tmp_path: Path) -> None:
    logs = [SlowLog(tmp_path / str(stage)) for stage in range(2)]
    want = undisturbed(llama, RINGS[1], 6)
    with local_ring(llama, plan_of(llama, RINGS[1]), logs=logs) as pipeline:
        driver, pages = Driver(pipeline), (0, 1, TAIL_PAGE)
        tokens = driver.begin(pages)
        driver.wait(driver.move(OUT, 0, 0))
        logs[1].going.clear()
        tokens.append(
            driver.run(
                Slice(1, 140, (tokens[-1],), pages, GREEDY),
                moves=[driver.move(SPILL, 0, key=b"a"), driver.move(FETCH, 1, key=b"b")],
            )
        )
        driver.decode(tokens, pages, 5)
        assert tokens == want
        assert driver.moved[1] == [1] and driver.lost[1] == []
        waiting = driver.submit()
        logs[1].going.set()
        results = driver.take(waiting)
        assert driver.moved == [[1, 2], [1, 2]] and driver.lost == [[3], [3]]
        assert results[1].times.kv_wait > 0


def test_a_pass_without_micro_batches_needs_no_moves_and_no_host_slots(llama: Path) -> None:
    with local_ring(llama, plan_of(llama, RINGS[1], host_pages=0)) as pipeline:
        driver, pages = Driver(pipeline), (0, 1, TAIL_PAGE)
        driver.wait()
        tokens = driver.begin(pages)
        assert [result.times.kv_wait for result in driver.wait()] == [0.0, 0.0]
        driver.decode(tokens, pages, 8)
    assert tokens == undisturbed(llama, RINGS[1], 8)


def test_moves_that_never_end_are_a_stage_error(llama: Path, tmp_path: Path) -> None:
    log = SlowLog(tmp_path / "log")
    log.going.clear()
    ring = local_ring(llama, plan_of(llama, RINGS[0]), logs=[log], deadline=0.5)
    with ring as pipeline:
        driver = Driver(pipeline)
        with pytest.raises(StageError, match=r"stage 0: moves of KV pages that pass 1 waits for"):
            driver.wait(driver.move(FETCH, 0, key=b"a"))
        log.going.set()


def test_a_ring_closes_while_pages_move(llama: Path, tmp_path: Path) -> None:
    log = SlowLog(tmp_path / "log")
    with local_ring(llama, plan_of(llama, RINGS[0], host_pages=64), logs=[log]) as pipeline:
        driver = Driver(pipeline)
        driver.begin((0, 1, TAIL_PAGE))
        moves = [driver.move(kind, slot, 0) for slot in range(32) for kind in (OUT, SPILL)]
        driver.take(driver.submit(Slice(2, 0, prompt(3, 5), (4,), GREEDY), moves=moves))


def test_moves_are_in_the_trace(llama: Path, tmp_path: Path) -> None:
    log = SlowLog(tmp_path / "log")
    plan = plan_of(llama, RINGS[0])
    with local_ring(llama, plan, logs=[log]) as pipeline:
        pipeline.begin_trace(64)
        driver = Driver(pipeline)
        driver.begin((0, 1, TAIL_PAGE))
        for kind in (OUT, SPILL, FETCH, IN):
            driver.wait(driver.move(kind, 0, 0, b"key"))
        [recorded] = pipeline.end_trace()()
    trace = recorded.trace
    assert trace is not None
    found = {kind: [span for span in trace.spans if span.kind is kind] for kind in Kind}
    assert [(span.name, span.number) for span in found[Kind.KV_COPY]] == [("out", 1), ("in", 4)]
    assert [(span.name, span.number) for span in found[Kind.KV_LOG]] == [("spill", 2), ("fetch", 3)]
    assert all(span.nbytes > 0 for kind in (Kind.KV_COPY, Kind.KV_LOG) for span in found[kind])
    assert len(found[Kind.KV_WAIT]) == 4
