"""Decodes in lanes: padded, in place, and with the same tokens. CUDA graphs themselves need CUDA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import greedy, tiny_model
from rings import CallAgain, local_ring, manual_plan, run_all

from headrace.runtime.batch import Batch
from headrace.runtime.conversion.convert import convert
from headrace.runtime.graphs import (
    IDLE,
    SELDOM,
    DecodeGraphs,
    Layers,
    padded_pages,
    padded_rows,
)
from headrace.runtime.kv.store import KVStore
from headrace.runtime.model import Prepared
from headrace.runtime.recording import Capture, CudaCapture
from headrace.runtime.store import Store
from headrace.runtime.trace import NULL_TRACER
from headrace.scheduler.memory import GRAPH_LAYER_BYTES
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import MicroBatch, Slice
from headrace.scheduler.request import Request, SamplingParams

LENGTHS = (1, 3, 40, 60, 65, 9, 14, 20, 33, 70, 5)
"""Eleven sequences, which lanes pad, and which cross from one page to two."""


class Unable:
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


def made(name: str, folder: Path) -> tuple[Path, list[Request], dict[int, list[int]]]:
    model = tiny_model(name)
    model.save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist()
        for n in LENGTHS
    ]
    requests = [
        Request(i, list(prompt), SamplingParams(temperature=0.0, max_tokens=6 + i % 5), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    wanted = {i: greedy(model, prompt, 6 + i % 5) for i, prompt in enumerate(prompts)}
    return folder / "store", requests, wanted


RINGS: list[dict[str, Any]] = [
    {"stages": 1, "tier": Tier.DEVICE},
    {"stages": 1, "tier": Tier.NVME, "layers_a_visit": 2},
    {"stages": 2, "tier": Tier.NVME, "cyclic": True},
]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_same_tokens(name: str, ring: dict[str, Any], tmp_path: Path) -> None:
    store, requests, wanted = made(name, tmp_path)
    plan = manual_plan(Store.open(store), graph_rows=16, **ring)
    capture = CallAgain()
    with local_ring(store, plan, capture=capture) as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    assert max(capture.replays) > 3


def test_without_recordings_nothing_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, requests, wanted = made("llama", tmp_path)
    plan = manual_plan(Store.open(store), graph_rows=16)
    with local_ring(store, plan, capture=Unable()) as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    assert len([r for r in caplog.records if "not as CUDA graphs" in r.message]) == 1


def test_decodes_without_room_for_graphs_are_right_too(tmp_path: Path) -> None:
    store, requests, wanted = made("llama", tmp_path)
    plan = manual_plan(Store.open(store), tier=Tier.DEVICE, graph_rows=16, graph_lanes=1)
    capture = CallAgain()
    with local_ring(store, plan, capture=capture) as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    # What precedes the layers, and each of three visits.
    assert len(capture.replays) == 4 and min(capture.replays) > 0


class Counting:
    """A model whose layers add one to hidden states [T, 1]."""

    tracer = NULL_TRACER

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def rows(self, batch: Batch, onto: torch.Tensor | None = None) -> torch.Tensor:
        if onto is not None:
            return onto.zero_()
        return torch.zeros(len(batch.positions), 1, device=self.device)

    def enter(self, rows: torch.Tensor, batch: Batch) -> Prepared:
        return Prepared(batch, rows, ())

    def is_static(self, layer: int) -> bool:
        return True

    def interrupts(self, layer: int) -> bool:
        return False

    def bind(self, layer: int, block: torch.Tensor) -> None:
        pass

    def run_layers(self, layers: Layers, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x + len(layers)


class Lanes:
    """Lanes of a stage of 3 layers; `run` runs them for so many sequences of so many tokens."""

    def __init__(self, capture: Capture, lanes: int, layers: int, device: str = "cpu") -> None:
        model: Any = Counting(device)
        self.graphs = DecodeGraphs(
            model,
            KVStore({}, 1, torch.float32, model.device),
            capture,
            max_rows=64,
            max_pages=1024,
            max_lanes=lanes,
            max_layers=layers,
        )
        self.blocks = [torch.zeros(1) for _ in range(6)]

    def run(self, sequences: int, tokens: int = 1, index: int = 0, slot: int = 0) -> bool:
        pages = tuple(range(pages_for(tokens)))
        pieces = [Slice(i, tokens - 1, (5,), pages, None) for i in range(sequences)]
        ready = self.graphs.ready(index, MicroBatch(tuple(pieces)))
        assert ready is not None
        lane = self.graphs.lane(index, ready)
        if lane is not None:
            layers = list(enumerate(self.blocks[slot : slot + 3]))
            x = lane.run(layers, torch.zeros(sequences, 1, device=lane.prepared.x.device))
            assert x.tolist() == [[3.0]] * sequences
        return lane is not None


def test_a_lane_is_recorded_when_it_is_used_again() -> None:
    capture = CallAgain()
    lanes = Lanes(capture, lanes=2, layers=8)
    assert lanes.run(3) and capture.replays == [1]
    assert lanes.run(4) and capture.replays == [2, 1]
    assert all(lanes.run(n, tokens=n * 60) for n in (3, 4))  # the same sizes: up to 4 pages
    assert capture.replays == [4, 3]
    assert lanes.run(4, tokens=257) and lanes.graphs.recorded == 5


def test_sizes_that_are_seldom_use_a_larger_lane() -> None:
    capture = CallAgain()
    lanes = Lanes(capture, lanes=4, layers=99)
    assert lanes.run(60) and lanes.run(60) and capture.replays == [2, 1]
    for sequences in range(59, 0, -1):  # a batch that shrinks
        assert lanes.run(sequences)
    assert capture.replays == [61, 60]
    assert lanes.run(9, index=1) and lanes.run(9, tokens=257)  # there is no larger one
    assert len(capture.replays) == 4
    for _ in range(SELDOM + 2):
        assert lanes.run(2)
    assert len(capture.replays) == 6


def test_lanes_are_few() -> None:
    lanes = Lanes(CallAgain(), lanes=2, layers=8)
    assert lanes.run(1) and lanes.run(2)
    assert not lanes.run(4) and not lanes.run(1, tokens=300) and not lanes.run(1, index=1)
    assert lanes.run(1) and lanes.run(2)


def test_layers_that_are_recorded_are_few() -> None:
    capture = CallAgain()
    lanes = Lanes(capture, lanes=2, layers=8)
    for _ in range(3):  # a streamed visit, which lies in other slots from pass to pass
        assert all(lanes.run(1, slot=slot) for slot in range(3))
    assert len(capture.replays) == 3 and lanes.graphs.recorded == 7
    assert lanes.run(2) and lanes.run(2) and lanes.graphs.recorded == 8


def test_a_lane_out_of_use_makes_room() -> None:
    capture = CallAgain()
    lanes = Lanes(capture, lanes=2, layers=8)
    assert lanes.run(1) and lanes.run(2)
    taken = [lanes.run(4) or not lanes.run(2) for _ in range(2 * IDLE)]
    assert taken.index(True) == IDLE  # a turn is two micro-batches, and there are two lanes
    assert not lanes.run(1, index=1)


def test_sizes_that_change_for_ever_are_seldom_recorded() -> None:
    capture = CallAgain()
    lanes = Lanes(capture, lanes=4, layers=16)
    passes = 3000
    for i in range(passes):
        lanes.run(1 + i * 7 % 40, tokens=1 + i * 211 % 5000)
    assert len(capture.replays) <= 2 * (4 + passes / IDLE)


def test_padding_is_little() -> None:
    sizes = {padded_rows(n) for n in range(1, 257)}
    assert len(sizes) <= 18
    assert all(n <= padded_rows(n) <= max(2 * n, n + 31) for n in range(1, 257))
    assert padded_rows(256) == 256
    assert [padded_pages(n) for n in (1, 4, 5, 16, 17, 2000)] == [4, 4, 16, 16, 64, 4096]


class Placing(Counting):
    """A model whose layers add what was made of positions before them, in memory of a recording."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.made: list[torch.Tensor] = []

    def enter(self, rows: torch.Tensor, batch: Batch) -> Prepared:
        self.made.append(batch.positions[:, None].float())
        return Prepared(batch, rows, (((), {"places": (self.made[-1], None)}),))

    def run_layers(self, layers: Layers, x: torch.Tensor, *given: Any) -> torch.Tensor:
        prepared: Prepared = given[0]
        return x + prepared.calls[0][1]["places"][0]


class OnePool(CallAgain):
    """Recordings that all write to the same memory, as CUDA graphs with one pool may."""

    def __init__(self, model: Placing) -> None:
        super().__init__()
        self._model = model

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def again() -> None:
            for made in self._model.made:
                made.fill_(torch.nan)
            self._model.made.clear()
            work()

        return super().record(again)


def test_recordings_of_one_lane_leave_nothing_where_those_of_others_write() -> None:
    """A lane's layers may have been recorded before what another lane does before its layers."""
    model: Any = Placing()
    capture = OnePool(model)
    nothing = KVStore({}, 1, torch.float32, model.device)
    graphs = DecodeGraphs(
        model, nothing, capture, max_rows=8, max_pages=4, max_lanes=4, max_layers=99
    )

    def run(*starts: int) -> list[float]:
        found = []
        batches = [MicroBatch((Slice(0, start, (5,), (0,), None),)) for start in starts]
        made = [graphs.ready(i, batch) for i, batch in enumerate(batches)]
        lanes = [graphs.lane(i, ready) for i, ready in enumerate(made) if ready is not None]
        model.made.clear()  # what was not recorded has memory of its own
        for lane in lanes:
            assert lane is not None
            x = torch.zeros(1, 1)
            for layer in range(2):
                x = lane.run([(layer, torch.zeros(1))], x)
            found.append(x.item())
        return found

    for _ in range(3):
        assert run(7) == [14]
    for start in range(20, 24):
        assert run(start, 9, 30) == [2 * start, 18, 60]
    assert max(capture.replays) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_cuda_graphs_give_the_same_tokens(
    name: str, ring: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, requests, wanted = made(name, tmp_path)
    plan = manual_plan(Store.open(store), graph_rows=16, **ring)
    with local_ring(store, plan, "cuda") as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    assert not [record for record in caplog.records if record.name.startswith("headrace")]


@pytest.mark.gpu
def test_the_only_lane_on_cuda_makes_room() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        lanes = Lanes(CudaCapture(), lanes=1, layers=4, device="cuda")
        for sequences in (1, 9, 1, 9):
            taken = [lanes.run(sequences) for _ in range(IDLE + 4)]
            assert taken[-1] and lanes.graphs.recorded == 4


@pytest.mark.gpu
def test_pinned_memory_can_be_let_go_while_something_is_recorded() -> None:
    """As another thread does with a pass that is over."""
    x = torch.zeros(1 << 20, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        copied = [torch.ones(1 << 20).pin_memory()]
        x.copy_(copied[0], non_blocking=True)

        def work() -> None:
            copied.clear()
            x.add_(1.0)

        again = CudaCapture().record(work)
        torch.cuda.current_stream().synchronize()
        # Asks whether the memory is free again.
        assert torch.empty(1 << 20, pin_memory=True).is_pinned()
        again()
        assert x.sum().item() == 2 << 20


@pytest.mark.gpu
def test_graphs_that_are_garbage_stay_until_a_recording_is_over() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(8, device="cuda")

        def add() -> None:
            x.add_(1.0)

        def work() -> None:
            gone: list[Any] = [[] for _ in range(100_000)]  # more than a collection waits for
            gone.clear()
            add()

        old: list[Any] = [CudaCapture().record(add)]
        old.append(old)
        del old
        CudaCapture().record(work)()
        assert x.sum().item() == 8


@pytest.mark.gpu
def test_the_driver_takes_no_more_for_a_graph_than_is_planned() -> None:
    x, layers, graphs = torch.zeros(8, 4096, device="cuda"), 8, 32

    def work() -> None:
        for _ in range(layers * 64):
            x.add_(1.0)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        capture = CudaCapture()
        work()
        again = [capture.record(work)]
        again[0]()
        stream.synchronize()
        before, _ = torch.cuda.mem_get_info()
        again += [capture.record(work) for _ in range(graphs)]
        for one in again:
            one()
        stream.synchronize()
        after, _ = torch.cuda.mem_get_info()
    assert (before - after) / graphs / layers <= GRAPH_LAYER_BYTES
