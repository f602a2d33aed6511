"""The line that says where the seconds of a start went."""

from headrace.cluster.start_times import StartTimes


def test_steps_follow_each_other() -> None:
    now = 10.0
    times = StartTimes(lambda: now)
    now = 15.0
    times.ended("Ray")
    now = 21.34
    times.ended("reading 13.8 GB")
    assert str(times) == "started in 11.3 s: Ray 5.0, reading 13.8 GB 6.3"
