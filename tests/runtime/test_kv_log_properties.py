"""A KV log against a dict, whatever is done to it in whatever order."""

import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kv_logs import SEGMENT, get, key_of, page_of, segments

from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
from headrace.runtime.kv_log.record import Miss

COHORTS = st.integers(0, 3)
TENANTS = st.sampled_from(["a", "b"])
NAMES = st.integers(0, 40)
SIZES = (900, 70_000, 300_000)


def size_of(name: int) -> int:
    return SIZES[name % 3]


class LogMachine(RuleBasedStateMachine):
    """With room for everything, so that what was put and not deleted has to be there."""

    cap = 64 << 20

    @initialize(encrypted=st.booleans())
    def start(self, encrypted: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.directory = root / "kv"
        self.keys = KeyRing(root / "keys") if encrypted else None
        self.now = 1e9
        self.model: dict[int, tuple[str, int, int]] = {}  # name -> tenant, cohort, run
        self.run_number = 0
        self.log = self.opened()

    def opened(self) -> KVLog:
        return KVLog.open(
            self.directory,
            b"id",
            self.cap,
            keys=self.keys,
            keep=True,
            segment_bytes=SEGMENT,
            clock=lambda: self.now,
        )

    @rule(cohort=COHORTS, tenant=TENANTS, names=st.lists(NAMES, max_size=6))
    def put(self, cohort: int, tenant: str, names: list[int]) -> None:
        given = [(key_of(name), memoryview(page_of(key_of(name), size_of(name)))) for name in names]
        assert self.log.put(cohort, given, tenant=tenant) == [key for key, _ in given]
        for name in names:
            self.model.setdefault(name, (tenant, cohort, self.run_number))

    @rule(name=NAMES)
    def get(self, name: int) -> None:
        key = key_of(name)
        page = get(self.log, key, size_of(name))
        assert page == (page_of(key, size_of(name)) if name in self.model else None)

    @rule()
    def flush(self) -> None:
        self.log.flush()
        assert self.log.stats.bytes_live == sum(map(size_of, self.model))

    @rule(cohort=COHORTS, tenant=TENANTS)
    def drop(self, cohort: int, tenant: str) -> None:
        receipt = self.log.drop(cohort, tenant=tenant)
        self.forget(receipt, lambda place: place == (tenant, cohort, self.run_number))

    @rule(tenant=TENANTS)
    def purge(self, tenant: str) -> None:
        self.forget(self.log.purge(tenant), lambda place: place[0] == tenant)

    def forget(self, receipt, gone) -> None:
        names = [name for name, place in self.model.items() if gone(place)]
        assert receipt.pages + receipt.pages_in_memory == len(names)
        for name in names:
            del self.model[name]

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.log = self.opened()
        self.run_number += 1

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "log"):
            assert {*self.log.keys()} == {key_of(name) for name in self.model}
            files = sum(file.stat().st_size for file in segments(self.directory))
            assert self.log.stats.file_bytes == files
            assert not any(
                n for miss, n in self.log.stats.misses.items() if miss is not Miss.ABSENT
            )

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
            self.folder.cleanup()


class CappedMachine(LogMachine):
    """Without room: pages go when they must, and then they are just absent."""

    cap = 2 * SEGMENT

    @rule(cohort=COHORTS, tenant=TENANTS, names=st.lists(NAMES, max_size=6))
    def put(self, cohort: int, tenant: str, names: list[int]) -> None:
        given = [(key_of(name), memoryview(page_of(key_of(name), size_of(name)))) for name in names]
        kept = self.log.put(cohort, given, tenant=tenant)
        held = {*self.log.keys()}
        assert {*kept} <= held
        for name in names:
            self.model.setdefault(name, (tenant, cohort, self.run_number))
        self.model = {name: at for name, at in self.model.items() if key_of(name) in held}

    @rule()
    def flush(self) -> None:
        self.log.flush()
        held = {*self.log.keys()}
        self.model = {name: at for name, at in self.model.items() if key_of(name) in held}

    @rule()
    def reopen(self) -> None:
        self.flush()
        super().reopen()
        held = {*self.log.keys()}
        self.model = {name: at for name, at in self.model.items() if key_of(name) in held}

    @invariant()
    def the_cap_is_kept(self) -> None:
        if hasattr(self, "log"):
            files = sum(file.stat().st_size for file in segments(self.directory))
            assert files <= self.cap + SEGMENT


_settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestLog = LogMachine.TestCase
TestLog.settings = _settings
TestCapped = CappedMachine.TestCase
TestCapped.settings = _settings
