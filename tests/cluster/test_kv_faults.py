"""Files of KV pages that are damaged, cut and deleted while a run uses them: never another token."""

import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from kv_logs import segments
from kv_runs import CAP, answers, paged_engine, prompt, wide_llama
from rings import manual_plan

from headrace.runtime.kv_log.record import BLOCK, Miss
from headrace.runtime.stage_config import LogConfig
from headrace.runtime.store import Store
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import MoveKind

PROMPTS = [prompt(i, 140 + 5 * i) for i in range(6)]
NEW = 2
FAULTS = 1000
AT_ONCE = 8


def plan_of(store: Path, **room: int) -> Plan:
    given = {"num_pages": 7, "max_sequences": 3, "host_pages": 4, "nvme_pages": 500} | room
    return manual_plan(Store.open(store), tier=Tier.DEVICE, token_budget=256, **given)


def flip(file: Path, chance: random.Random) -> None:
    at = chance.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << chance.randrange(8)]))


def cut(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def delete(file: Path, chance: random.Random) -> None:
    file.unlink()


def blank(file: Path, chance: random.Random) -> None:
    """A block that the drive lost."""
    with file.open("r+b") as opened:
        opened.seek(chance.randrange(-(-file.stat().st_size // BLOCK)) * BLOCK)
        opened.write(bytes(BLOCK))


def mix(file: Path, chance: random.Random) -> None:
    """Blocks of another file, whole and with good checksums, where they do not belong."""
    other = chance.choice(segments(file.parent)).read_bytes()
    with file.open("r+b") as opened:
        opened.seek(BLOCK * chance.randrange(2))
        start = BLOCK * chance.randrange(2)
        opened.write(other[start:])


def exchange(file: Path, chance: random.Random) -> None:
    other = chance.choice(segments(file.parent))
    away = file.with_suffix(".away")
    file.rename(away)
    with suppress(FileNotFoundError):
        other.rename(file)
    away.rename(other)


Fault = Callable[[Path, random.Random], None]
KINDS: list[Fault] = [flip, cut, delete, blank, mix, exchange]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("encrypted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_thousand_faults_and_never_another_token(tmp_path: Path, encrypted: bool) -> None:
    store = wide_llama(tmp_path)
    with paged_engine(store, plan_of(store, num_pages=64, host_pages=0, nvme_pages=0)) as engine:
        want = [answers(engine, [tokens], NEW)[0] for tokens in PROMPTS]
    keys = str(tmp_path / "keys") if encrypted else None
    log = LogConfig(str(tmp_path / "kv"), CAP, keep=True, key_file=keys, plaintext=not encrypted)
    chance, done = random.Random(1), Counter[str]()
    hits = lost = 0
    misses = Counter[Miss]()
    while done.total() < FAULTS // 2:  # as many of each parameter
        with paged_engine(store, plan_of(store), log) as engine:
            for _ in range(8):  # then it is opened again, and what was damaged is read at the start
                assert answers(engine, PROMPTS, NEW, keep=True) == want
                for _ in range(AT_ONCE):
                    fault = chance.choice(KINDS)
                    files = [file for file in segments(tmp_path / "kv" / "stage-0") if file.stat().st_size]  # fmt: skip
                    if files:
                        fault(chance.choice(files), chance)
                        done[fault.__name__] += 1
            kv, (report,) = engine.stats.kv, engine.log_reports()
            assert report is not None
            hits, lost = hits + kv.hits.nvme, lost + kv.lost[MoveKind.FETCH]
            misses.update(report.stats.misses)
    assert set(done) == {kind.__name__ for kind in KINDS}
    # Both happened: pages that were used, and pages that were found out.
    assert hits > 100 and lost > 100, (hits, lost)
    assert misses[Miss.DAMAGED] and misses[Miss.STALE] and misses[Miss.IO], misses
