"""What a recorder keeps, with a clock that tests set and on CUDA's own."""

import threading
import time

import pytest
import torch

from headrace.runtime.recorder import HostTraceClock, Recorder, make_recorder
from headrace.runtime.trace import NULL_TRACER, Kind, Span


class ManualClock(HostTraceClock):
    """Seconds that the test sets; what comes after `known` has not happened yet."""

    def __init__(self) -> None:
        self.time = 0
        self.known = 1_000_000

    def now(self, kind: Kind) -> int:
        return self.time

    def resolve(self, moment: object) -> int | None:
        assert isinstance(moment, int)
        return moment if moment <= self.known else None


def run_pass(recorder: Recorder, clock: ManualClock, step: int, spans: int = 1) -> None:
    with recorder.one_pass(step):
        for _ in range(spans):
            with recorder.span(Kind.MATMUL):
                clock.time += 1


def passes_of(spans: tuple[Span, ...]) -> list[int]:
    return [span.number for span in spans if span.kind is Kind.PASS]


def test_nothing_is_kept_or_allocated_without_a_trace() -> None:
    assert not NULL_TRACER.on
    assert NULL_TRACER.span(Kind.MATMUL) is NULL_TRACER.span(Kind.READ, "layer", 3, 4096)
    with NULL_TRACER.one_pass(0), NULL_TRACER.span(Kind.VISIT), NULL_TRACER.span(Kind.MATMUL):
        pass


def test_the_newest_passes_are_kept_and_all_are_summed() -> None:
    clock = ManualClock()
    recorder = Recorder(clock, passes=3)
    for step in range(10):
        run_pass(recorder, clock, step, spans=2)
    trace = recorder.take()
    assert passes_of(trace.spans) == [7, 8, 9]
    assert len(trace.spans) == 9
    assert trace.seconds == pytest.approx({Kind.MATMUL: 20e-9, Kind.PASS: 20e-9})
    assert trace.complete
    assert recorder.take().spans == ()


def test_the_number_of_spans_is_bounded() -> None:
    clock = ManualClock()
    recorder = Recorder(clock, passes=100, spans=10)
    for step in range(5):
        run_pass(recorder, clock, step, spans=3)
    assert passes_of(recorder.take().spans) == [3, 4]
    run_pass(recorder, clock, 5, spans=50)
    trace = recorder.take()
    assert len(trace.spans) == 10
    assert not trace.complete


def test_what_is_still_to_come_is_kept_for_later() -> None:
    clock = ManualClock()
    recorder = Recorder(clock)
    with recorder.one_pass(0):
        with recorder.span(Kind.COPY):
            clock.time = 5
        clock.time, clock.known = 4, 4
    assert [span.kind for span in recorder.take().spans] == [Kind.PASS]
    clock.known = 5
    assert [(s.kind, s.start, s.end) for s in recorder.take().spans] == [(Kind.COPY, 0, 5)]


def test_a_pass_that_fails_is_kept() -> None:
    clock = ManualClock()
    recorder = Recorder(clock)
    with pytest.raises(ZeroDivisionError), recorder.one_pass(3), recorder.span(Kind.VISIT):
        raise ZeroDivisionError
    assert [span.kind for span in recorder.take().spans] == [Kind.VISIT, Kind.PASS]


def test_threads_record_beside_the_passes() -> None:
    recorder = make_recorder(torch.device("cpu"))

    def read() -> None:
        for number in range(500):
            with recorder.span(Kind.READ, "file", number, 10):
                pass

    threads = [threading.Thread(target=read, name=f"reader-{i}") for i in range(3)]
    for thread in threads:
        thread.start()
    before = time.time_ns()
    for step in range(20):
        with recorder.one_pass(step), recorder.span(Kind.MATMUL):
            pass
    for thread in threads:
        thread.join()
    spans = recorder.take().spans
    reads = sorted((s.thread, s.number) for s in spans if s.kind is Kind.READ)
    assert reads == [(f"reader-{i}", number) for i in range(3) for number in range(500)]
    assert all(before <= s.start <= s.end <= time.time_ns() for s in spans if s.kind is Kind.PASS)


@pytest.mark.gpu
def test_streams_are_timed_on_the_hosts_clock() -> None:
    device = torch.device("cuda")
    compute, copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    dest = torch.empty_like(host, device=device)
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(compute):
        recorder = make_recorder(device)
        for step in range(3):
            with recorder.one_pass(step):
                with torch.cuda.stream(copies), recorder.span(Kind.COPY, nbytes=host.nbytes):
                    dest.copy_(host, non_blocking=True)
                with recorder.span(Kind.VISIT):
                    for _ in range(20):
                        with recorder.span(Kind.MATMUL):
                            x @ x
                compute.synchronize()
        copies.synchronize()
    spans = recorder.take().spans
    passes = [s for s in spans if s.kind is Kind.PASS]
    for step in passes:
        inside = [
            s
            for s in spans
            if s.kind in (Kind.VISIT, Kind.MATMUL) and step.start <= s.start <= s.end <= step.end
        ]
        assert len(inside) == 21
        visit = next(s for s in inside if s.kind is Kind.VISIT)
        products = sum(s.end - s.start for s in inside if s.kind is Kind.MATMUL)
        assert 0.5 * (visit.end - visit.start) < products <= visit.end - visit.start
    copied = [s for s in spans if s.kind is Kind.COPY]
    assert len(copied) == 3
    assert all(1e6 < s.end - s.start < 1e9 for s in copied[1:])


@pytest.mark.gpu
def test_a_captured_graph_is_not_timed_from_inside() -> None:
    x, stream = torch.ones(64, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        recorder = make_recorder(x.device)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), recorder.span(Kind.MATMUL):
            y = x * 2
        with recorder.one_pass(0):
            with recorder.span(Kind.VISIT):
                graph.replay()
            stream.synchronize()
    assert y.sum().item() == 128
    assert sorted(s.kind.value for s in recorder.take().spans) == ["pass", "visit"]
