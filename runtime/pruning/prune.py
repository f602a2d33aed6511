"""Prunes a checkpoint or a store into a smaller store: calibration, choice, and a conversion that resumes.

Statistics of the calibration tokens lie beside the conversion's journal until the store is whole, so that a
run that was killed makes the same choices again and goes on where it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PretrainedConfig

from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.convert import (
    identity_of,
    refuse_missing_tokenizer,
    write_store,
)
from headrace.runtime.conversion.destination import finished_store, locked
from headrace.runtime.conversion.journal import Journal
from headrace.runtime.conversion.plan import Options
from headrace.runtime.conversion.writer import Progress
from headrace.runtime.pruning.choice import Request, any_choice, check_request, choose
from headrace.runtime.pruning.report import Report, make_report, read_report, write_report
from headrace.runtime.pruning.statistics import Statistics, gather
from headrace.runtime.pruning.surgery import Subject
from headrace.runtime.pruning.trial import check_cuts
from headrace.runtime.store import JOURNAL, Store
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep
from headrace.scheduler.errors import HeadraceError

STATISTICS = "headrace-prune.statistics"


@dataclass(frozen=True, slots=True)
class Calibration:
    """`tokens` [sequences, length] int64, and where they are run: `device_memory` in bytes, None for what it takes."""

    tokens: Tensor
    device: torch.device
    dtype: torch.dtype
    device_memory: int | None = None

    @property
    def digest(self) -> str:
        """Of what results depend on."""
        data = self.tokens.contiguous().numpy().tobytes()
        said = f"{tuple(self.tokens.shape)} {self.dtype} {self.device.type}"
        return xxhash.xxh3_128_hexdigest(data + said.encode())


@dataclass(frozen=True, slots=True)
class Reporter:
    """What is told of progress: layers of the sweep (done, of how many), and bytes that are written."""

    layers: Callable[[int, int], None] | None = None
    writing: Callable[[Progress], None] | None = None


def prune(
    source: Path,
    dest: Path,
    request: Request,
    calibration: Callable[[], Calibration] | None = None,
    *,
    format: str = "keep",
    reporter: Reporter = Reporter(),
    self_check: Callable[[PretrainedConfig], bool] | None = None,
    allow_missing_tokenizer: bool = False,
) -> tuple[Store, Report]:
    """Writes the checkpoint or store in `source`, without what `request` asks to leave out, as a store in `dest`.

    `calibration` is asked for its tokens, which decide where activations do, and tell layers' influence in any
    case. `format` is that of `convert`, but "keep" by default. The report is in `dest`, too (headrace-prune.json).
    Run again with the same arguments, it resumes. Raises HeadraceError for what cannot be had, before anything
    is written.
    """
    if source.is_file():
        raise HeadraceError(f"{source} is a file: give a checkpoint's directory, or a store of it")
    subject = Subject(Checkpoint(source, stores=True))
    refuse_missing_tokenizer(subject.checkpoint, allow_missing_tokenizer)
    _refuse(subject, request, has_text=calibration is not None)
    given = None if calibration is None else calibration()
    options = Options(format)
    asked: dict[str, Any] = request.as_json() | {"calibration": given and given.digest}
    identity = identity_of(subject.checkpoint, options.as_json() | {"prune": asked})
    with locked(dest):
        finished = finished_store(dest, identity)
        if finished is not None:
            (dest / STATISTICS).unlink(missing_ok=True)
            return finished, read_report(dest)
        with Journal(dest, identity) as journal:
            try:
                found = None
                if given is not None:
                    found = _statistics(subject, dest, request, given, reporter)
                stays = choose(request, subject, found)
                pruned = subject.without(stays)
            except HeadraceError:
                if not journal.done:
                    # Nothing was begun that another attempt, perhaps with other options, would go on with.
                    (dest / STATISTICS).unlink(missing_ok=True)
                    (dest / JOURNAL).unlink()
                raise
        # First, so that a store that is whole has one.
        report = make_report(subject, pruned, options, request, stays, found)
        write_report(dest, report)
        store = write_store(pruned, dest, options, identity, reporter.writing, self_check)
        (dest / STATISTICS).unlink(missing_ok=True)
    return store, report


def _refuse(subject: Subject, request: Request, *, has_text: bool) -> None:
    """Whatever can be known to be impossible before calibration."""
    check_request(request, subject)
    if request.needs_text and not has_text:
        raise HeadraceError(
            "activations decide what is left out, so a text is needed: give --calibrate FILE, or name "
            "layers (--drop-layers 3,7) and use --method magnitude"
        )
    if request.neurons or request.heads:
        check_cuts(subject.config, cut_neurons=bool(request.neurons), cut_heads=bool(request.heads))
    subject.without(any_choice(request, subject))


def _statistics(
    subject: Subject, dest: Path, request: Request, given: Calibration, reporter: Reporter
) -> Statistics:
    """Those of an earlier run, or gathered now and kept beside the journal."""
    file = dest / STATISTICS
    if file.exists():
        return Statistics.load(file)
    found = _gathered(subject, request, given, reporter)
    found.save(file)
    return found


def _gathered(
    subject: Subject, request: Request, given: Calibration, reporter: Reporter
) -> Statistics:
    with Sweep(
        open_model(subject.checkpoint.path),
        given.device,
        given.dtype,
        context=given.tokens.shape[1],
        device_memory=given.device_memory,
    ) as sweep:
        return gather(sweep, subject, given.tokens, request.wanted(subject), reporter.layers)
