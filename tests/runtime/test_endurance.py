import json
import logging
import threading
from pathlib import Path

import pytest

from headrace.runtime.kv_log.endurance import DriveWear, WriteBudget, drive_wear, read_written

HOUR = 3600


class Clock:
    now = 500_000 * HOUR + 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_budget_everything_is_allowed_and_nothing_written(tmp_path):
    budget = WriteBudget(tmp_path / "w", None)
    assert budget.take(10**15)
    assert budget.left is None
    assert budget.written == 10**15
    budget.close()
    assert not [*tmp_path.iterdir()]


def test_a_rolling_day(tmp_path, caplog):
    clock = Clock()
    budget = WriteBudget(tmp_path / "w", 1000, clock)
    assert budget.take(600)
    clock.now += 12 * HOUR
    assert budget.take(400)
    assert budget.left == 0
    assert not budget.take(1)
    assert not budget.take(1)
    assert len(caplog.records) == 1
    assert "the 1000 bytes a day" in caplog.text
    clock.now += 12 * HOUR
    assert budget.left == 600
    assert budget.take(600)
    assert not budget.take(1)
    assert len(caplog.records) == 2
    budget.close()
    budget.close()


def test_a_restart_does_not_reset_it(tmp_path):
    clock = Clock()
    first = WriteBudget(tmp_path / "w", 1000, clock)
    assert first.take(700)
    first.close()
    second = WriteBudget(tmp_path / "w", 1000, clock)
    assert second.left == 300
    assert second.written == 0
    assert read_written(tmp_path / "w") == 700


def test_a_killed_process_has_booked_a_little_more_than_it_wrote(tmp_path):
    clock = Clock()
    killed = WriteBudget(tmp_path / "w", 100_000, clock)
    for _ in range(70):
        assert killed.take(500)
    left = WriteBudget(tmp_path / "w", 100_000, clock).left
    assert left is not None
    assert 65_000 - 1001 - 500 <= left <= 65_000


def test_what_is_not_asked_for_counts_too(tmp_path):
    budget = WriteBudget(tmp_path / "w", 1000, Clock())
    budget.add(900)
    assert not budget.take(200)
    budget.add(900)
    assert budget.left == 0


def test_threads_do_not_overspend(tmp_path):
    budget = WriteBudget(tmp_path / "w", 100_000, Clock())
    taken: list[int] = []

    def work() -> None:
        taken.extend(7 for _ in range(5000) if budget.take(7))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    budget.close()
    assert 100_000 - 7 < sum(taken) <= 100_000 + 4 * 7
    assert read_written(tmp_path / "w") == sum(taken)


@pytest.mark.parametrize("content", [b"", b"{", b'{"total": -1}', b"[]"])
def test_a_damaged_file(tmp_path, caplog, content):
    (tmp_path / "w").write_bytes(content)
    budget = WriteBudget(tmp_path / "w", 1000, Clock())
    assert budget.left == 1000
    assert "counted from 0" in caplog.text


def test_a_file_that_cannot_be_written(tmp_path, caplog):
    budget = WriteBudget(tmp_path / "missing" / "w", 1000, Clock())
    for _ in range(3):
        assert budget.take(100)
    assert budget.left == 700
    assert caplog.text.count("cannot be noted") == 1


def test_a_budget_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="positive number of bytes a day, not 0"):
        WriteBudget(tmp_path / "w", 0)


@pytest.fixture
def sys(tmp_path):
    """A /sys with one NVMe drive, of which `tmp_path` is on a partition."""
    number = tmp_path.stat().st_dev
    disk = tmp_path / "sys" / "devices" / "block" / "nvme0n1"
    part = disk / "nvme0n1p2"
    part.mkdir(parents=True)
    (part / "partition").write_text("2\n")
    (disk / "stat").write_text("  1 2 3 4 5 6 7000 8 9 10 11\n")
    link = tmp_path / "sys" / "dev" / "block" / f"{number >> 8 & 0xFFF}:{number & 0xFF}"
    link.parent.mkdir(parents=True)
    link.symlink_to(part)
    return tmp_path / "sys"


SMARTCTL = {"nvme_smart_health_information_log": {"percentage_used": 7, "data_units_written": 2000}}
NVME = {"percent_used": 8, "data_units_written": 3000}


def test_wear_by_smartctl(tmp_path, sys):
    asked = []

    def run(command):
        asked.append(command)
        return json.dumps(SMARTCTL)

    assert drive_wear(tmp_path, sys=sys, run=run) == DriveWear(
        "nvme0n1", 7000 * 512, 2000 * 512_000, 7, "by smartctl"
    )
    assert asked == [("smartctl", "--json", "--all", "/dev/nvme0n1")]


@pytest.mark.parametrize("other", [None, "not JSON", "{}", "[]", '{"smartctl": {}}'])
def test_wear_by_nvme_cli(tmp_path, sys, other):
    wear = drive_wear(
        tmp_path, sys=sys, run=lambda command: json.dumps(NVME) if command[0] == "nvme" else other
    )
    assert (wear.percent_used, wear.lifetime_written) == (8, 3000 * 512_000)
    assert str(wear) == "nvme0n1: 8% of its life used (by nvme)"


def test_no_wear_is_said_so(tmp_path, sys):
    wear = drive_wear(tmp_path, sys=sys, run=lambda _: None)
    assert wear.percent_used is wear.lifetime_written is None
    assert wear.written_since_boot == 7000 * 512
    assert "wear unknown: smartctl and nvme are not installed, may not read nvme0n1" in str(wear)


def test_no_drive_of_its_own(tmp_path):
    wear = drive_wear(tmp_path, sys=tmp_path / "nothing")
    assert wear == DriveWear(
        None, None, None, None, "the directory is on no block device of its own"
    )


def test_this_machine(caplog):
    caplog.set_level(logging.WARNING)
    wear = drive_wear(Path(__file__))
    assert wear.percent_used is None or 0 <= wear.percent_used <= 255
    assert str(wear)
