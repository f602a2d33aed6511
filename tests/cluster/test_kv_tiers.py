"""Where pages of keys and values lie changes no token: on the device, in host RAM, on NVMe, or gone."""

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kv_logs import on_drive
from kv_runs import CAP, answers, assert_moved, paged_engine, prompt, wide_llama
from rings import manual_plan

from headrace.runtime.stage_config import LogConfig
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError, KVLogError
from headrace.scheduler.kv_room import segment_bytes
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import MoveKind
from headrace.scheduler.request import SamplingParams

OUT, IN, SPILL, FETCH, SINK = MoveKind
COMMON = prompt(99, 140)
PROMPTS = [COMMON + prompt(i, 80 + 10 * i) for i in range(4)] + [
    prompt(i, 150 + 20 * i) for i in range(4, 8)
]
NEW = 28


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("llama"))


def plan_of(store: Path, *, kv_format: str = "fp32", stages: int = 2, **room: int) -> Plan:
    """Device pages for few of the requests, unless said otherwise."""
    given = {"num_pages": 11, "max_sequences": 4, "token_budget": 100, "num_tails": 6} | room
    return manual_plan(
        Store.open(store), stages=stages, tier=Tier.DEVICE, kv_format=kv_format, **given
    )


_undisturbed: dict[tuple[Path, str], list[list[int]]] = {}


def undisturbed(store: Path, kv_format: str = "fp32") -> list[list[int]]:
    """Answers where nothing is short and nothing is shared."""
    if (store, kv_format) not in _undisturbed:
        plan = plan_of(store, kv_format=kv_format, num_pages=64, stages=1)
        found = []
        for tokens in PROMPTS:
            with paged_engine(store, plan) as engine:
                found += answers(engine, [tokens], NEW)
        _undisturbed[store, kv_format] = found
    return _undisturbed[store, kv_format]


def log_in(folder: Path, **more: object) -> LogConfig:
    return LogConfig(str(folder / "kv"), CAP, **more)  # type: ignore[arg-type]


TIERS = {"device": (0, 0), "host": (40, 0), "nvme": (5, 500), "all": (20, 500)}
"""Pages that have room in host RAM and on NVMe."""


@pytest.mark.parametrize(
    ("tiers", "kv_format"),
    [
        pytest.param(tiers, kv_format, marks=() if tiers in quick else pytest.mark.slow)
        for kv_format, quick in (("fp32", {"all"}), ("int8", {"all"}))
        for tiers in TIERS
    ],
)
def test_no_tier_changes_a_token(llama: Path, tmp_path: Path, kv_format: str, tiers: str) -> None:
    host_pages, nvme_pages = TIERS[tiers]
    want = undisturbed(llama, kv_format)
    plan = plan_of(llama, kv_format=kv_format, host_pages=host_pages, nvme_pages=nvme_pages)
    with paged_engine(llama, plan, log_in(tmp_path) if nvme_pages else None) as engine:
        for _ in range(2):
            assert answers(engine, PROMPTS, NEW, keep=True) == want
        kv, reports = engine.stats.kv, engine.log_reports()
    assert kv.hits.device and not any(kv.lost.values())
    assert kv.preempted_by_swap + kv.preempted_by_recompute
    assert kv.hits.host or host_pages < 20  # in fewer slots hardly anything lasts
    assert (kv.hits.nvme > 0) == (nvme_pages > 0)
    if host_pages:
        assert_moved(kv, OUT, IN)
        assert kv.preempted_by_swap
    if nvme_pages:
        assert_moved(kv, SPILL, FETCH)
        assert all(report and report.stats.payload_written for report in reports)


@pytest.mark.parametrize(
    ("kv_format", "encrypted"),
    [
        ("fp32", False),
        ("int8", True),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("int8", False, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_the_pages_of_the_one_before(
    llama: Path, tmp_path: Path, kv_format: str, encrypted: bool
) -> None:
    key_file = str(tmp_path / "keys") if encrypted else None
    log = log_in(tmp_path, keep=True, key_file=key_file, plaintext=not encrypted)
    plan = plan_of(llama, kv_format=kv_format, host_pages=8, nvme_pages=500)
    hits = []
    for _ in range(2):
        with paged_engine(llama, plan, log) as engine:
            assert answers(engine, PROMPTS, NEW, keep=True) == undisturbed(llama, kv_format)
            hits.append(engine.stats.kv)
    assert hits[1].hits.total > hits[0].hits.total and hits[1].misses < hits[0].misses
    # All that is full of the prompts is there; more, if an answer was cut by a victim's way back.
    full = sum((len(tokens) - 1) // 64 for tokens in PROMPTS)
    assert hits[1].hits.total >= full and hits[1].hits.nvme


def test_what_was_kept_is_no_other_tenants_and_no_other_formats(
    llama: Path, tmp_path: Path
) -> None:
    log = log_in(tmp_path, keep=True, plaintext=True)
    plan = plan_of(llama, host_pages=8, nvme_pages=500)
    with paged_engine(llama, plan, log, tenant="a") as engine:
        answers(engine, PROMPTS[4:5], NEW, keep=True)
    for other, tenant in ((plan, "b"), (plan_of(llama, kv_format="int8", host_pages=8, nvme_pages=500), "a")):  # fmt: skip
        with paged_engine(llama, other, log, tenant=tenant) as engine:
            answers(engine, PROMPTS[4:5], NEW)
            assert not engine.stats.kv.hits.total
    with paged_engine(llama, plan, log, tenant="a") as engine:
        assert answers(engine, PROMPTS[4:5], NEW) == undisturbed(llama)[4:5]
        assert engine.stats.kv.hits.nvme == len(PROMPTS[4]) // 64


def test_another_key_file_finds_nothing_and_takes_nothing_away(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, host_pages=8, nvme_pages=500)

    def hits(keys: str) -> int:
        log = log_in(tmp_path, keep=True, key_file=str(tmp_path / keys))
        with paged_engine(llama, plan, log) as engine:
            assert answers(engine, PROMPTS[4:5], NEW, keep=True) == undisturbed(llama)[4:5]
            return engine.stats.kv.hits.nvme

    assert [hits("one") > 0, hits("other") > 0, hits("one") > 0] == [False, False, True]


@contextmanager
def watched(directory: Path) -> Iterator[list[int]]:
    """The most bytes that each folder in `directory` takes meanwhile, looked up all the time."""
    most: dict[str, int] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            for folder in directory.glob("stage-*"):
                try:
                    most[folder.name] = max(most.get(folder.name, 0), on_drive(folder))
                except FileNotFoundError:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    result: list[int] = []
    try:
        yield result
    finally:
        ended.set()
        thread.join()
        result += most.values()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_drive_is_never_overfull_and_empty_afterwards(
    llama: Path, tmp_path: Path, kept: bool
) -> None:
    cap = 4 << 20
    log = LogConfig(str(tmp_path / "kv"), cap, keep=kept, plaintext=kept)
    plan = plan_of(llama, host_pages=5, nvme_pages=500)
    want = undisturbed(llama)
    with watched(tmp_path / "kv") as most, paged_engine(llama, plan, log) as engine:
        for shift in range(4):  # what was kept of other prompts has to go
            others = [[(token + shift) % 250 for token in tokens] for tokens in PROMPTS]
            found = answers(engine, others, NEW, keep=True)
            assert shift or found == want
        stats = [report.stats for report in engine.log_reports() if report]
        assert all(each.bytes_written > cap and each.segments_dropped for each in stats)
    assert len(most) == 2 and all(0 < each <= cap + segment_bytes(cap, 0) for each in most)
    left = sorted(path.name for path in (tmp_path / "kv").rglob("*") if path.is_file())
    assert bool(left) == kept
    assert kept or not any((tmp_path / "kv").iterdir())


def test_a_folder_of_another_process_is_one_error(llama: Path, tmp_path: Path) -> None:
    plan, log = plan_of(llama, host_pages=5, nvme_pages=500), log_in(tmp_path)
    with (
        paged_engine(llama, plan, log),
        pytest.raises(KVLogError, match=rf"stage-0 is in use by process {os.getpid()}"),
        paged_engine(llama, plan, log),
    ):
        pass


def test_a_key_file_that_others_may_read_is_refused(llama: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("{}")
    keys.chmod(0o644)
    log = log_in(tmp_path, keep=True, key_file=str(keys))
    with (
        pytest.raises(HeadraceError, match="others could read the KV keys"),
        paged_engine(llama, plan_of(llama, host_pages=5, nvme_pages=500), log),
    ):
        pass


@pytest.mark.slow
def test_a_daily_budget_that_is_spent_costs_pages_and_no_token(llama: Path, tmp_path: Path) -> None:
    log = log_in(tmp_path, daily_writes=2_000_000)
    plan = plan_of(llama, host_pages=5, nvme_pages=500)
    with paged_engine(llama, plan, log) as engine:
        for _ in range(2):
            assert answers(engine, PROMPTS, NEW, keep=True) == undisturbed(llama)
        stats = [report.stats for report in engine.log_reports() if report]
        assert all(each.refused and each.payload_written <= 2_000_000 for each in stats)
        assert engine.stats.kv.lost[SPILL]


@pytest.mark.slow
def test_a_drive_that_is_full_costs_pages_and_no_token(llama: Path, tmp_path: Path) -> None:
    """Files may not grow: what a write gets is EFBIG, as it is ENOSPC on a full drive."""
    plan = plan_of(llama, host_pages=5, nvme_pages=500)
    want = undisturbed(llama)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with paged_engine(llama, plan, log_in(tmp_path)) as engine:
        assert answers(engine, PROMPTS, NEW, keep=True) == want
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, before[1]))
        try:
            again = [tokens[1:] for tokens in PROMPTS]
            answers(engine, again, NEW, keep=True)
            assert answers(engine, PROMPTS, NEW, keep=True) == want
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert engine.stats.kv.lost[SPILL]


@pytest.mark.slow
def test_pages_go_when_their_time_is_over(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, host_pages=5, nvme_pages=500)
    with paged_engine(llama, plan, log_in(tmp_path, ttl=0.2)) as engine:
        assert answers(engine, PROMPTS, NEW, keep=True) == undisturbed(llama)
        time.sleep(0.25)
        assert answers(engine, PROMPTS, NEW, keep=True) == undisturbed(llama)
        assert engine.stats.kv.lost[FETCH]


WINDOW = {
    "host_pages": 9,
    "nvme_pages": 100,
    "window_pages": 30,
    "hot_window": 128,
    "kv_ring_pages": 12,
    "cold_micro_batches": 2,
    "max_context": 64 * 7,
    "max_sequences": 8,
    "num_tails": 12,
}
OLD = [COMMON + prompt(i, 160 + 10 * i) for i in range(3)] + [prompt(i, 330) for i in range(4, 7)]
_alone: dict[tuple[Path, str], list[list[int]]] = {}


def alone(store: Path, kv_format: str) -> list[list[int]]:
    """Answers to OLD where nothing is short."""
    if (store, kv_format) not in _alone:
        plan = plan_of(store, kv_format=kv_format, num_pages=64, stages=1, max_sequences=8)
        with paged_engine(store, plan) as engine:
            _alone[store, kv_format] = answers(engine, OLD, NEW)
    return _alone[store, kv_format]


@pytest.mark.parametrize(
    ("kv_format", "stages", "plaintext"),
    [
        ("int8", 2, True),
        pytest.param("fp32", 1, False, marks=pytest.mark.slow),
        pytest.param("fp32", 2, False, marks=pytest.mark.slow),
    ],
)
def test_old_pages_on_nvme_change_no_token(
    llama: Path, tmp_path: Path, kv_format: str, stages: int, plaintext: bool
) -> None:
    plan = plan_of(llama, kv_format=kv_format, stages=stages, **WINDOW)
    log = log_in(tmp_path, plaintext=plaintext)
    with watched(tmp_path / "kv") as most, paged_engine(llama, plan, log) as engine:
        assert answers(engine, OLD, NEW) == alone(llama, kv_format)
        kv, times = engine.stats.kv, engine.stats.stages
        assert kv.moved[SINK] and not kv.lost[SINK] and not kv.spoiled
        assert all(0 < each.kv_sunk_bytes < each.kv_cold_bytes for each in times)
        files = {file.name for file in (tmp_path / "kv").rglob("*") if file.is_file()}
        assert all(name == "headrace-kv.lock" or name.startswith("segment-") for name in files)
        sizes = [status.st_size for _, status in nameless(tmp_path)]
        assert len(sizes) == stages
    for named, size in zip(most, sizes, strict=True):
        assert named + size <= CAP + segment_bytes(CAP - size, 0)
    assert not any((tmp_path / "kv").iterdir()) and not nameless(tmp_path)


def nameless(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Files of this process in the folder that no name leads to, as /proc shows them."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            target = os.readlink(link)
            if target.startswith(str(folder)) and target.endswith(" (deleted)"):
                found.append((link, link.stat()))
    return found


@pytest.mark.slow
def test_damage_to_old_pages_costs_computation_and_no_token(llama: Path, tmp_path: Path) -> None:
    """All of them, several times while requests decode over them."""
    plan, spoiled = plan_of(llama, stages=2, **WINDOW), 0
    with paged_engine(llama, plan, log_in(tmp_path)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
        ids = [engine.add(tokens, params, seed=0) for tokens in OLD]
        link, status = nameless(tmp_path)[1]
        done = {}
        while engine.has_work:
            done |= {completion.request_id: completion.token_ids for completion in engine.step()}
            if engine.stats.passes % 10 == 0:
                with link.open("r+b") as file:
                    for place in range(0, status.st_size, 4096):
                        file.seek(place)
                        file.write(b"damage")
        assert [done[i] for i in ids] == alone(llama, "fp32")
        spoiled = engine.stats.kv.spoiled
    assert 0 < spoiled <= len(OLD)
