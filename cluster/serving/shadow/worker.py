"""The shadow's process: `python -m headrace.cluster.serving.shadow.worker`, with messages on its standard input and
output. It ends when its input does."""

import os
import queue
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import psutil
import torch

from headrace.cluster.serving.shadow.messages import LENGTH_BYTES, Order, Report, Setup, framed
from headrace.cluster.serving.shadow.samples import padded_length
from headrace.cluster.wire import decode
from headrace.runtime.evaluation.answers import Answer, AnswerFigures
from headrace.runtime.evaluation.compare import compare_answers
from headrace.runtime.evaluation.measure import Progress
from headrace.runtime.sweep.source import SweptModel, open_model
from headrace.runtime.sweep.sweep import Sweep
from headrace.scheduler.errors import HeadraceError


class Orders:
    """What the server says, read by a thread of its own, which ends the process with the server."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.setup = decode(_payload(source), Setup)
        self._batches: queue.SimpleQueue[tuple[Answer, ...]] = queue.SimpleQueue()
        self._may_go_on = threading.Event()
        threading.Thread(target=self._read, name="headrace-shadow", daemon=True).start()

    def next_batch(self) -> tuple[Answer, ...]:
        return self._batches.get()

    def pause(self, _what: str, _done: int, _whole: int) -> None:
        """Returns when the server has nothing better to do: the progress of a comparison, which calls it between two layers."""
        self._may_go_on.wait()

    def _read(self) -> None:
        while True:
            order = decode(_payload(self._source), Order)
            (self._may_go_on.clear if order.hold else self._may_go_on.set)()
            if order.batch is not None:
                self._batches.put(order.batch)


def _payload(source: BinaryIO) -> bytes:
    """The next message's. At the end of the input the process ends at once, whatever it is doing."""
    length = int.from_bytes(_exactly(source, LENGTH_BYTES), "big")
    return _exactly(source, length)


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        os._exit(0)
    return data


class Comparison:
    """Both models, of which nothing is in memory between two batches."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._device, self._dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        self._models: tuple[SweptModel, SweptModel] | None = None

    def run(self, batch: tuple[Answer, ...], progress: Progress) -> AnswerFigures:
        """Raises HeadraceError when a model cannot be read."""
        setup = self._setup
        longest = max(len(answer.tokens) for answer in batch)
        context = padded_length(longest, setup.longest)
        reference, store = self._opened()
        with self._sweep(reference, context) as beside, self._sweep(store, context) as served:
            return compare_answers(beside, served, batch, context, setup.tie, progress)

    def _opened(self) -> tuple[SweptModel, SweptModel]:
        if self._models is None:
            setup = self._setup
            reference = open_model(Path(setup.reference), lambda _: setup.latents)
            store = open_model(Path(setup.store))
            self._models = reference, store
        return self._models

    def _sweep(self, model: SweptModel, context: int) -> Sweep:
        return Sweep(
            model,
            self._device,
            self._dtype,
            context=context,
            micro_batch_tokens=self._setup.micro_batch,
            host_memory=self._setup.memory,  # what was said must be in no file
        )


def _yield_to_others() -> None:
    """Whoever else wants the drives has them, and memory is taken from here first."""
    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def main() -> None:
    _yield_to_others()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print
    orders = Orders(sys.stdin.buffer)
    comparison = Comparison(orders.setup)
    while True:
        batch = orders.next_batch()
        try:
            report = Report(figures=comparison.run(batch, orders.pause))
        except HeadraceError as error:
            report = Report(error=str(error))
        answers.write(framed(report))
        answers.flush()


if __name__ == "__main__":
    main()
