"""What is brought to NVMe before the end of a run, and what pages cost."""

import random

import pytest
from fake_tiers import FakeTiers

from headrace.scheduler.config import KVCosts, SchedulerConfig
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.kv_room import kv_costs
from headrace.scheduler.layouts import resident_layouts
from headrace.scheduler.memory import page_bytes, slot_bytes
from headrace.scheduler.moves import MoveReports
from headrace.scheduler.placement import Prediction
from headrace.scheduler.plan import PAGE_TOKENS, MoveKind, Pass, Sample
from headrace.scheduler.planner import Choices
from headrace.scheduler.request import Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

OUT, IN, SPILL, FETCH, _ = MoveKind


class Run:
    """A scheduler whose passes are computed at once, and whose moves end with every pass."""

    def __init__(self, loss: float = 0.0, **room: int) -> None:
        limits = {"num_pages": 30, "host_pages": 3, "nvme_pages": 90, "write_backs": 1} | room
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_context=640,
                token_budget=2000,
                max_sequences=8,
                micro_batches=1,
                micro_batch_tokens=2000,
                **limits,
            )
        )
        self.tiers = FakeTiers(random.Random(0), loss=loss, lossy=(OUT, SPILL))
        self._reports = MoveReports(2)
        self.passes: list[Pass] = []

    def add(self, number: int, pages: int, *, story: int, keep: bool = False) -> None:
        tokens = [1000 * story + i for i in range(pages * PAGE_TOKENS)]
        params = SamplingParams(max_tokens=2)
        self.scheduler.add(Request(number, tokens, params, seed=0, keep=keep))

    def take(self, a_pass: Pass) -> None:
        self.passes.append(a_pass)
        pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
        for move in a_pass.moves:
            self.tiers.contents[move.key] = (move.key,)
            if move.kind is OUT:
                for stage in self.tiers.stages:
                    stage.device[move.page] = (move.key,)
        self.tiers.start(a_pass.moves)
        samples = [Sample(piece.request, 7, None, ()) for piece in pieces if piece.sampling]
        merged = self._reports.merge(self.tiers.report(a_pass.step, everything=True))
        self.scheduler.update(a_pass, samples, *merged)
        self.scheduler.holdings.check_integrity()

    def work(self) -> None:
        while (a_pass := self.scheduler.schedule()) is not None:
            self.take(a_pass)

    def save(self) -> None:
        while (a_pass := self.scheduler.save()) is not None:
            assert not a_pass.micro_batches and len(self.passes) < 100
            self.take(a_pass)


def test_kept_pages_that_found_no_slot_are_saved_at_the_end() -> None:
    run = Run()
    for number in range(3):
        run.add(number, 4, story=number, keep=True)
    run.work()
    assert run.scheduler.kv_stats().nvme < 12
    run.save()
    assert run.scheduler.kv_stats().nvme == 12
    assert all(len(stage.log) == 12 for stage in run.tiers.stages)


def test_what_was_found_again_is_saved_and_what_nobody_wanted_is_not() -> None:
    run = Run()
    for number, story in enumerate((0, 0, 1)):
        run.add(number, 3, story=story)
        run.work()
    run.save()
    assert (
        run.scheduler.kv_stats().nvme == 2
    )  # a prompt's last page was computed for its last token


def test_nothing_is_saved_where_there_is_no_nvme() -> None:
    run = Run(nvme_pages=0)
    run.add(0, 4, story=0, keep=True)
    run.work()
    done = len(run.passes)
    run.save()
    # Moves that were asked for before are carried out, and no more.
    assert all(move.kind is OUT for a_pass in run.passes[done:] for move in a_pass.moves)


@pytest.mark.parametrize("loss", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("host_pages", [1, 2, 7, 70])
def test_saving_ends_whatever_is_lost(loss: float, host_pages: int) -> None:
    run = Run(loss, host_pages=host_pages, num_pages=14, nvme_pages=90)
    for number in range(9):
        run.add(number, 1 + number % 4, story=number % 5, keep=number % 3 > 0)
        if number % 2:
            run.work()
    run.work()
    run.save()
    held = run.scheduler.kv_stats()
    assert sum(held.lost.values()) > 0 if loss else held.nvme > 0
    assert run.scheduler.save() is None


def test_a_page_costs_its_bytes_and_a_token_its_arithmetic() -> None:
    shape = ModelShape(
        layer_bytes=(1 << 20,) * 4,
        layer_kv_bytes=(1 << 20,) * 4,
        layer_parameters=(1 << 20,) * 4,
        layer_active_parameters=(1 << 20,) * 4,
        largest_matrix=1 << 18,
        embed_bytes=1,
        head_bytes=1,
        hidden_size=64,
        vocab_size=64,
        intermediate_size=64,
        max_context=512,
        compute_bytes=2,
        needs_scratch=False,
        kv_format="bf16",
    )
    fast = DeviceProfile("cuda", 5.0, 20.0, 100.0, 1000.0, 1e-4, 10.0)
    slow = DeviceProfile("cuda", 1.0, 10.0, 100.0, 1000.0, 1e-4, 10.0)
    layout = next(iter(resident_layouts(4, 2, "cuda", Choices())))
    slot = slot_bytes(page_bytes(shape, layout, 1))
    assert slot == 2 << 20
    terms = {"nvme": 3.0, "pcie": 2.0, "compute": 0.5, "hbm": 0.1, "hops": 0.0}
    prediction = Prediction(100, 3.0, 33.0, "nvme", terms)
    costs = kv_costs(shape, layout, [fast, slow], prediction)
    # The slower stage decides; that passes take 3 s for weights' sake is no price of a token.
    assert costs == KVCosts(slot / 10e9, slot / 10e9 + slot / 1e9, 0.005)


def test_every_full_page_is_written_through_while_its_request_runs() -> None:
    run = Run(write_through=True)
    run.add(0, 8, story=1)
    run.add(1, 6, story=2)
    while run.scheduler.has_work:
        a_pass = run.scheduler.schedule()
        assert a_pass is not None
        run.take(a_pass)
    while (a_pass := run.scheduler.settle()) is not None:
        run.take(a_pass)
    # The last page of each has a place for the token that is drawn.
    assert run.scheduler.kv_stats().nvme >= 2
